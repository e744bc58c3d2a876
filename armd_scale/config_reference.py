"""Generates docs/reference/configuration.md from the types and docstrings of the configuration.

``python -m armd_scale.config_reference`` prints the page.
"""

import inspect
import re
import types
import typing

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from armd_scale.config import MOST, RunConfig, Section
from armd_scale.traits import TRAITS

_HEAD = """# Configuration

`python -m armd_scale.config_reference` writes this page from [config.py](../../armd_scale/config.py).

A configuration is a YAML file with the sections below. On the command line, `section.field=value` overrides a field:
`armd train --config configs/tiny.yaml model.layers=6 'data.text=[books.jsonl]'`. An unknown key, a wrong type and
values that contradict each other end the command with one error line. The run directory
holds the resolved configuration of a run. An integer of at least 1 is at most 10^9.

[D] marks a decision of this project where the paper is silent ([reasons](../explanation/decisions.md)).
"""


def page() -> str:
    """The whole page as Markdown."""
    sections: dict[type[Section], list[str]] = {}
    _collect(RunConfig, "", sections)
    return "\n".join([_HEAD, *(_section(section, paths) for section, paths in sections.items())])


def _collect(section: type[Section], path: str, found: dict[type[Section], list[str]]) -> None:
    """Every section below ``section`` in the order of the file -> the paths at which it is used."""
    found.setdefault(section, []).append(path)
    for name, field in section.model_fields.items():
        for inner in _sections_of(field.annotation):
            _collect(inner, f"{path}.{name}".removeprefix("."), found)


def _sections_of(annotation: object) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in typing.get_args(annotation) for section in _sections_of(inner)]


def _section(section: type[Section], paths: list[str]) -> str:
    title = ", ".join(f"`{path}`" for path in paths) if paths != [""] else "Top level"
    lines = [f"## {title}", "", _text(inspect.getdoc(section) or ""), ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if not field.exclude:
            cells = (
                f"`{name}`",
                _type(field.annotation, field.metadata),
                _default(field),
                _text(field.description or ""),
            )
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _type(annotation: object, metadata: typing.Sequence[object] = ()) -> str:
    """A type in words, with the bounds that pydantic checks."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0], arguments[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if argument is type(None) else _type(argument) for argument in arguments)
    if origin is list:
        text = f"list of {_type(arguments[0])}"
    elif origin is dict:
        text = f"map of {_type(arguments[0])} to {_type(arguments[1])}"
    elif _sections_of(annotation):
        text = "section"
    else:
        text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        if any(getattr(each, "func", None) is not None for each in metadata):  # the check of ``Objective``
            return ", ".join(f"`{name}`" for name in TRAITS)
    bounds = ", ".join(filter(None, map(_bound, _flat(metadata))))
    return f"{text} ({bounds})" if bounds else text


def _flat(metadata: typing.Sequence[object]) -> typing.Iterator[object]:
    for each in metadata:
        yield from each.metadata if isinstance(each, FieldInfo) else [each]


def _bound(check: object) -> str:
    for kind, name, sign in (
        (annotated_types.Ge, "ge", ">="),
        (annotated_types.Gt, "gt", ">"),
        (annotated_types.Le, "le", "<="),
        (annotated_types.Lt, "lt", "<"),
        (annotated_types.MultipleOf, "multiple_of", "multiple of"),
        (annotated_types.MinLen, "min_length", "length >="),
        (annotated_types.MaxLen, "max_length", "length <="),
    ):
        if isinstance(check, kind):
            bound = getattr(check, name)
            if bound == MOST:  # named at the top of the page
                return ""
            return f"{sign} {bound:,}" if isinstance(bound, int) else f"{sign} {bound:g}"
    return ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, Section):
        return ""
    text = yaml.safe_dump(field.default, default_flow_style=True, width=10**6).strip()
    return f"`{text.removesuffix('...').strip()}`"


def _text(docstring: str) -> str:
    """A docstring as one line of Markdown."""
    line = " ".join(docstring.split()).replace("``", "`")
    return re.sub(r"docs/([a-z]+)/([a-z]+\.md)", r"[\2](../\1/\2)", line)


if __name__ == "__main__":
    print(page(), end="")
