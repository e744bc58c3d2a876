"""The language of configuration files: YAML 1.2, and dotted overrides on the command line.

YAML 1.1 reads ``time: 12:00:00`` as 43200, ``010`` as 8 and ``off`` as false; YAML 1.2 reads text, 10 and text. A
number remembers how it is written, because it may stand in a field of text (``name: 007``).
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from armd_scale.errors import UserError

_NULL, _BOOL, _INT, _FLOAT, _MISSING = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "???"))
_RESOLVERS = [
    (_NULL, r"~|null|Null|NULL|", "~nN"),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?\d+(?:_\d+)*(?:[eE]\+?\d+)?|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
    (_MISSING, r"\?\?\?", "?"),
]


class _Number:
    text: str
    """The number as it is written."""


class _Int(int, _Number):
    pass


class _Float(float, _Number):
    pass


class _Missing:
    """The value ``???``, which an override has to replace."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def _int(self, node: Any) -> _Int:
        digits = node.value.lower()
        base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
        mantissa, _, exponent = digits.partition("e") if base == 10 else (digits, "", "")
        if len(exponent) > 3:
            raise yaml.constructor.ConstructorError(None, None, f"{node.value} is too large", node.start_mark)
        return self._number(_Int(int(mantissa, base) * 10 ** int(exponent or 0)), node)

    def _float(self, node: Any) -> _Float:
        return self._number(_Float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan")), node)

    @staticmethod
    def _number(number: Any, node: Any) -> Any:
        number.text = node.value
        return number


class _Dumper(yaml.SafeDumper):
    """Quotes the text that ``_Loader`` would read as something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _tag, re.compile(rf"^(?:{_pattern})$"), [*_first, *([""] if _tag == _NULL else [])]
        )
_Loader.add_constructor(_INT, _Loader._int)
_Loader.add_constructor(_FLOAT, _Loader._float)
_Loader.add_constructor(_MISSING, lambda _loader, _node: _Missing())
_Dumper.add_representer(_Int, lambda dumper, number: dumper.represent_scalar(_INT, number.text))
_Dumper.add_representer(_Float, lambda dumper, number: dumper.represent_scalar(_FLOAT, number.text))


def read(path: Path | None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The values of a YAML file with ``section.field=value`` overrides; ``UserError`` if they cannot be read.

    ``section.list.0=value`` replaces an element of a list of the file. ``path`` None: overrides alone.
    """
    tree = {} if path is None else _load(path)
    for override in overrides:
        name, equals, value = override.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"override '{override}' is not of the form section.field=value")
        try:
            override.encode("utf-8")  # an argument of other bytes holds lone surrogates
            _set(tree, keys, _value(value))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"override '{override}' cannot be read: {_line(error)}") from error
    for name in _missing(tree, ""):
        raise UserError(f"{path}: {name} is ???, which stands for a value to be given: set it, or add {name}=VALUE")
    return tree


def _load(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as YAML: {_line(error)}") from error
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{path} is not a configuration: it must hold `section:` and `field: value` lines")
    return tree


def write(values: dict[str, Any]) -> str:
    """YAML that ``read`` reads as ``values``."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)


def as_written(value: Any) -> Any:
    """Numbers as the text that the file or the override spells, also in lists and mappings."""
    if isinstance(value, dict):
        return {as_written(key): as_written(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_written(inner) for inner in value]
    return value.text if isinstance(value, _Number) else value


def _value(text: str) -> Any:
    """The value of an override: a list, a mapping, a quoted text, a number, a constant, or else the text itself."""
    if text.lstrip()[:1] in ("[", "{", "'", '"'):
        return yaml.load(text, _Loader)
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text.strip(), (True, False))
    if tag == yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG or tag.endswith(":merge"):
        return text
    return loader.construct_object(yaml.ScalarNode(tag, text.strip()))


def _set(tree: Any, keys: list[str], value: Any) -> None:
    """Set ``tree[keys[0]][keys[1]]...``; the number of an element is the key of a list."""
    for at, key in enumerate(keys):
        is_last = at == len(keys) - 1
        index: Any = key
        if isinstance(tree, list):
            if not key.isdecimal() or int(key) >= len(tree):
                raise ValueError(f"{'.'.join(keys[:at])} has {len(tree)} elements, numbered from 0")
            index = int(key)
        elif not is_last and not isinstance(tree.get(key), dict | list):
            tree[key] = {}
        elif key not in tree:  # a key of a file can be a number
            index = next((known for known in tree if isinstance(known, _Number) and known.text == key), key)
        if is_last:
            tree[index] = value
        elif isinstance(tree, list) and not isinstance(tree[index], dict | list):
            tree[index] = {}
        tree = tree[index]


def _missing(tree: Any, name: str) -> Iterator[str]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if isinstance(value, _Missing):
            yield f"{name}{key}"
        yield from _missing(value, f"{name}{key}.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
