"""Models of transformers: import as checkpoint 0 of a run, and export of left-to-right models.

Both directions read and write tensor by tensor (``architectures`` has the table), so that memory holds one tensor, or
one file of weights.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from armd_scale import config as configs
from armd_scale import config_files, config_syntax
from armd_scale.config import RopeConfig, RunConfig
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.errors import UserError
from armd_scale.files import write_atomically
from armd_scale.training import architectures, checkpoint, export, manifest

SEED = {"width": [1.0, 3.0, 8.0], "gate": 0.0, "neighbour": True, "place": "before"}
"""Fields of ``model.prefix`` with which a model begins as the left-to-right transformer."""
LENGTH = 1024
"""Length of a run unless the configuration names one, in tokens; the model's own if that is shorter."""
_UNUSED = ("rotary_emb.inv_freq", "lm_head.weight")
"""Ends of names of tensors that are computed, or tied to others."""
_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Folder:
    """A model directory of transformers, whose tensors are read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _json(path / "config.json", "is not a model directory of transformers")
        with _named(path):
            architectures.find(self.config)
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        files = {single.name}
        if index.is_file():
            files = set(_json(index, "cannot be read").get("weight_map", {}).values())
        self._files: dict[str, Any] = {}
        for name in sorted(files):
            if not (path / name).is_file():
                raise UserError(f"{path / name} is missing: download the model again")
            try:
                file = safe_open(path / name, "pt")
                self._files |= dict.fromkeys(file.keys(), file)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path / name} cannot be read: {error}; download the model again") from error

    def check(self, pairs: list[architectures.Pair]) -> str:
        """``UserError`` if the tensors are not those of ``pairs``; returns their type."""
        wanted = {name: pair.foreign_shape for pair in pairs for name in pair.foreign}
        kinds = set()
        for name, shape in wanted.items():
            if name not in self._files:
                raise UserError(f"{self.path} has no tensor {name}: download the model again")
            entry = self._files[name].get_slice(name)
            kinds.add(entry.get_dtype())
            if tuple(entry.get_shape()) != shape:
                raise UserError(f"{self.path}: {name} has the shape {entry.get_shape()} instead of {list(shape)}")
        strange = [name for name in self._files if name not in wanted and not name.endswith(_UNUSED)]
        if strange:
            raise UserError(f"{self.path}: the tensor {strange[0]} would have to be supported")
        if kinds - set(_TYPES):
            raise UserError(f"{self.path} has weights of type {sorted(kinds - set(_TYPES))[0]}: dequantise them first")
        return "float32" if len(kinds) > 1 else _TYPES[kinds.pop()]

    def read(self, pair: architectures.Pair) -> Tensor:
        """A tensor of the checkpoint. Raises ``UserError`` if a value is not finite."""
        parts = [self._files[name].get_tensor(name) for name in pair.foreign]
        for name, part in zip(pair.foreign, parts, strict=True):
            if not part.isfinite().all():
                raise UserError(f"{self.path}: {name} holds values that are not finite: download the model again")
        return pair.join(parts)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name a directory in a ``UserError``, also of a ``config.json`` that lacks a value or has one of another type."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read: {error!r}; download the model again") from error


def _json(path: Path, wrong: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.parent} {wrong}: {path.name}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path.parent} {wrong}: {path.name} is no JSON object")
    return values


def configuration(
    folder: Folder, tokenizer: Tokenizer, run_dir: Path, values: dict[str, Any], place: object
) -> RunConfig:
    """The configuration of a run that begins with the model of ``folder``.

    ``values``: a configuration whose model section the model fills in; ``place`` names it in errors. Raises
    ``UserError`` if they contradict each other.
    """
    given = values.get("model") or {}
    with _named(folder.path):
        longest = architectures.longest(folder.config)
        fields = architectures.model_fields(folder.config, given.get("length") or min(longest, LENGTH))
    for name, value in {**fields, "bos_id": tokenizer.bos_id}.items():
        if name in given and given[name] is not None and not _equal(given[name], value):
            raise UserError(
                f"model.{name} is {given[name]} in the configuration but {value} in {folder.path}: remove the field"
            )
    model = {**fields, "bos_id": tokenizer.bos_id, "prefix": {**SEED, **(given.get("prefix") or {})}}
    data = {**(values.get("data") or {}), "tokenizer": str(run_dir / "tokenizer")}
    whole = {"name": folder.path.resolve().name, **values, "run_dir": str(run_dir), "data": data}
    config = config_files.validated({**whole, "model": {**given, **model}}, place)
    if config.traits.mask:
        raise UserError(f"{config.traits.label} needs a mask token, which {folder.path} lacks: objective=armd or ar")
    prefix = config.model.prefix
    if config.traits.streams == 2 and (prefix.kernel == "learned" or prefix.target_position):
        raise UserError("model.prefix has weights that the model lacks: kernel=gaussian and target_position=false")
    return config


def _equal(given: Any, value: Any) -> bool:
    """Whether a field of a configuration is that of a model; numbers of files in float32 are rounded."""
    if isinstance(value, dict):
        return isinstance(given, dict) and {**RopeConfig(**value).model_dump()} == RopeConfig(**given).model_dump()
    if isinstance(value, float) and isinstance(given, float | int):
        return math.isclose(given, value, rel_tol=1e-6)
    return bool(given == value)


def adopt(model_dir: Path, run_dir: Path, path: Path | None, overrides: list[str]) -> tuple[RunConfig, Path]:
    """Begin a run with the model of a directory of transformers.

    Returns the configuration and checkpoint 0. ``path``: configuration of the run; None: its defaults. Raises
    ``UserError``, and then leaves nothing behind.
    """
    folder = Folder(model_dir)
    tokenizer = tokenizers.load(model_dir)
    config = configuration(folder, tokenizer, run_dir, config_syntax.read(path, overrides), path or model_dir)
    model, run = config.model, config.run_directory
    assert model.vocab_size is not None
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(f"{tokenizer.path} has {tokenizer.vocab_size} entries but the model {model.vocab_size}")
    pairs = {pair.name: pair for pair in architectures.tensors(model)}
    kind = folder.check(list(pairs.values()))
    if run.complete_checkpoints():
        raise UserError(f"{run_dir} already has checkpoints: choose another run directory")
    rows = dict.fromkeys(("embedding.weight", "head.weight"), model.padded_vocab)
    shapes = {name: (rows.get(name, pair.shape[0]), *pair.shape[1:]) for name, pair in pairs.items()}
    gates: Tensor | None = None
    if config.traits.streams == 2 and model.prefix.gate is not None:
        gates = torch.full((len(model.prefix.widths), model.hidden), model.prefix.gate)
        shapes["prefix.gate"] = tuple(gates.shape)

    def read(name: str) -> Tensor:
        if name == "prefix.gate":
            assert gates is not None
            return gates
        return folder.read(pairs[name])

    state = {"identity": configs.identity(config), "samples": 0, "losses": []}
    facts = {
        "model": folder.path.resolve().name,
        "architecture": folder.config["architectures"][0],
        "dtype": kind,
        "bos": tokenizer.token(tokenizer.bos_id),
    }
    is_new = not run_dir.exists()
    try:
        first = checkpoint.begin(run, shapes, read, state, averaged=config.optimizer.ema > 0)
        (run_dir / "tokenizer").mkdir(exist_ok=True)
        tokenizers.copy(tokenizer, run_dir / "tokenizer")
        write_atomically(run.origin_path, json.dumps(facts, indent=1) + "\n")
        config_files.save(config, run.config_path)
    except BaseException:
        if is_new:
            shutil.rmtree(run_dir, ignore_errors=True)
        raise
    return config, first


def write_folder(
    config: RunConfig, source: Path, out: Path, averaged: bool, dtype: str | None, file_bytes: int
) -> dict[str, Any]:
    """Write checkpoint ``source`` of a left-to-right model as a directory that transformers reads without our code.

    ``dtype``: type of the weights; None: that of the imported model, else float32. Returns the number of parameters,
    the architecture and the type. Raises ``UserError``.
    """
    manifest.check_identity(source, config)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists: choose another output directory")
    tokenizer = export.tokenizer(config)
    settings = architectures.foreign_config(config.model)
    kind = dtype or config.run_directory.origin().get("dtype", "float32")
    weights = checkpoint.Weights(source, averaged)
    pairs = architectures.tensors(config.model)
    files = {name: (pair, index) for pair in pairs for index, name in enumerate(pair.foreign)}

    def read(name: str) -> Tensor:
        pair, index = files[name]
        tensor = weights.read(pair.name)[: pair.shape[0]]
        return pair.split(tensor)[index].to(getattr(torch, kind)).contiguous()

    with manifest.held(source), export.replacing(out) as partial:
        shapes = {name: pair.foreign_shape for name, (pair, _) in files.items()}
        width = torch.finfo(getattr(torch, kind)).bits // 8
        parameters = export.write_weights(shapes, read, partial, file_bytes, width)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        write_atomically(partial / "config.json", json.dumps({**settings, **ids, "dtype": kind}, indent=1) + "\n")
        tokenizers.copy(tokenizer, partial)
    return {"parameters": parameters, "architecture": settings["architectures"][0], "dtype": kind}
