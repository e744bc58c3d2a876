"""Reads, checks and writes configurations.

- ``load``: YAML file + dotted overrides (``model.layers=4``) -> ``RunConfig``. The error line for an unknown key names
  the nearest valid key; the error line for a wrong value names the field.
- ``save``: writes the resolved configuration, which reruns the run.
"""

import difflib
import types
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from armd_scale import config_syntax
from armd_scale.config import FORMER_PREFIX, RunConfig
from armd_scale.errors import UserError
from armd_scale.files import write_atomically
from armd_scale.run_directory import RunDirectory


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and dotted overrides into a checked configuration; ``UserError`` on anything wrong.

    The configuration in a run directory means this directory, wherever the run began.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no configuration file {path}; see configs/ for examples")
    run, values = RunDirectory.of_config(path), config_syntax.read(path, overrides)
    config = validated(_with_former(values) if run else values, path)
    if run and not any(override.startswith("run_dir=") for override in overrides):
        return config.model_copy(update={"run_dir": str(run.path)})
    return config


def _with_former(values: dict[str, Any]) -> dict[str, Any]:
    """The resolved configuration of a run; fields that are newer than the run keep its model as it was."""
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("prefix"), dict):
        return values
    return {**values, "model": {**model, "prefix": {**FORMER_PREFIX, **model["prefix"]}}}


def validated(values: dict[str, Any], place: object) -> RunConfig:
    """The configuration of ``values``; ``UserError`` names ``place`` if a value is wrong."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{place}: {_explain(error)}") from error


def load_run(run: RunDirectory) -> RunConfig:
    """The resolved configuration of a run directory; ``UserError`` when it is no run directory."""
    if not run.exists():
        raise UserError(f"{run.path} is not a run directory: it has no {run.config_path.name}")
    return load(run.config_path).model_copy(update={"run_dir": str(run.path)})


def save(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    write_atomically(Path(path), config_syntax.write(config.model_dump()))


def _explain(error: ValidationError) -> str:
    """The first problem of a validation error as one line, with the nearest valid name for an unknown key."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    where = ".".join(location)
    if first["type"] == "extra_forbidden":
        near = _nearest(location)
        return f"unknown key '{where}'; did you mean '{near}'?"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_type" and isinstance(first["input"], bool | None):
        message += f"; quote a word to make it text: {where}='{str(first['input']).lower()}'"
    if first["type"] == "list_type" and isinstance(first["input"], dict):
        message += "; give the whole list"
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} = {first['input']!r}: {message[0].lower()}{message[1:]}"


def _nearest(location: list[str]) -> str:
    """The most likely valid name of an unknown key: the same name in another section, or a similar name."""
    *sections, word = location
    every = _all_names(RunConfig)
    elsewhere = [name for name in every if name.rpartition(".")[2] == word]
    if elsewhere:
        return elsewhere[0]
    section: type[BaseModel] = RunConfig
    for part in sections:
        section = _section_of(section.model_fields[part].annotation) or section
    siblings = difflib.get_close_matches(word, section.model_fields, n=1, cutoff=0.5)
    if siblings:
        return ".".join([*sections, siblings[0]])
    return difflib.get_close_matches(".".join(location), every, n=1, cutoff=0.0)[0]


def _section_of(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, types.UnionType):
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _all_names(section: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        names += _all_names(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return names
