"""Models of transformers: import as checkpoint 0 of a run, and export of left-to-right models.

Both directions read and write tensor by tensor (``architectures`` has the table), so that memory holds one tensor, or
one file of weights.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from armd_scale import config as configs
from armd_scale import config_files, config_syntax
from armd_scale.config import ModelConfig, RopeConfig, RunConfig
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.errors import UserError
from armd_scale.files import write_atomically
from armd_scale.logs import CHECKPOINT as log
from armd_scale.run_directory import RunDirectory
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
        self._files: dict[str, Any] = {}
        for name in sorted(self._weight_files()):
            if not (path / name).is_file():
                raise UserError(f"{path / name} is missing: {self._advice()}")
            try:
                file = safe_open(path / name, "pt")
                self._files |= dict.fromkeys(file.keys(), file)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path / name} cannot be read: {error}; download the model again") from error

    def _weight_files(self) -> set[str]:
        """Names of the files of weights: a single file, which transformers prefers, or those of an index."""
        index, single = self.path / "model.safetensors.index.json", "model.safetensors"
        if (self.path / single).is_file() or not index.is_file():
            return {single}
        places = _json(index, "cannot be read").get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{index} has no weight_map: download the model again")
        return set(places.values())

    def _advice(self) -> str:
        if any(self.path.glob("*.bin")):
            return (
                "write the weights as safetensors, with transformers' from_pretrained(...).save_pretrained(DIRECTORY)"
            )
        return "download the model again"

    def _check_head(self) -> None:
        """``UserError`` if a head that is said to be the embedding is another one."""
        head, embedding = (
            self._files[name].get_tensor(name) if name in self._files else None
            for name in ("lm_head.weight", "model.embed_tokens.weight")
        )
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise UserError(
                f"{self.path}: lm_head.weight is not the embedding, but config.json has tie_word_embeddings = true"
            )

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
        if "lm_head.weight" not in wanted:
            self._check_head()
        strange = [name for name in self._files if name not in wanted and not name.endswith(_UNUSED)]
        if strange:
            raise UserError(f"{self.path}: the tensor {strange[0]} would have to be supported")
        if kinds - set(_TYPES):
            kind = sorted(kinds - set(_TYPES))[0]
            raise UserError(f"{self.path} has weights of type {kind}: write them as {', '.join(_TYPES.values())}")
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
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read: {error!r}; download the model again") from error


def _json(path: Path, wrong: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
    given, data = _section(values, place, "model"), _section(values, place, "data")
    seed = _section(given, place, "prefix", "model")
    if not isinstance(given.get("length"), int | None):
        config_files.validated({"model": {"length": given["length"]}}, place)
    if data.get("tokenizer") is not None:
        raise UserError(
            f"data.tokenizer = {data['tokenizer']}: an import has the tokenizer of its model; remove the field"
        )
    with _named(folder.path):
        longest = architectures.longest(folder.config)
        rope = _extension(folder, given, place)
        fields = architectures.model_fields(folder.config, given.get("length") or min(longest, LENGTH), rope)
        given = {name: value for name, value in given.items() if name != "rope" or not rope}
    for name, value in {**fields, "bos_id": tokenizer.bos_id}.items():
        if name in given and given[name] is not None and not _equal(given[name], value, place):
            raise UserError(
                f"model.{name} is {given[name]} in the configuration but {value} in {folder.path}: remove the field"
            )
    model = {**given, **fields, "bos_id": tokenizer.bos_id, "prefix": {**SEED, **seed}}
    whole = {"name": folder.path.resolve().name, **values, "run_dir": str(run_dir)}
    config = config_files.validated({**whole, "model": model}, place)
    if config.traits.mask:
        raise UserError(f"{config.traits.label} needs a mask token, which {folder.path} lacks: objective=armd or ar")
    if config.traits.streams == 2:
        _check_seed(config.model)
    return config


def _extension(folder: Folder, given: dict[str, Any], place: object) -> dict[str, Any] | None:
    """The configured scaling of rotary frequencies for a model that has none, to extend its length."""
    rope = _section(given, place, "rope", "model")
    checked = config_files.validated({"model": {"rope": rope}}, place).model.rope
    if checked.scaling == "none" or architectures.model_fields(folder.config)["rope"]:
        return None
    return {**checked.model_dump(include=set(rope)), "factor": checked.factor}


def _section(values: dict[str, Any], place: object, name: str, *around: str) -> dict[str, Any]:
    """A section of a configuration that is not checked yet; ``around``: the section that it lies in."""
    section = values.get(name) or {}
    if not isinstance(section, dict):
        wrong: dict[str, Any] = {name: section}
        for outer in around:
            wrong = {outer: wrong}
        config_files.validated(wrong, place)
    return section


def _check_seed(model: ModelConfig) -> None:
    """``UserError`` for a model that does not begin as the pretrained model, or that has more weights."""
    prefix = model.prefix
    for name in ("gate", "neighbour", "place"):
        if getattr(prefix, name) != SEED[name]:
            raise UserError(
                f"model.prefix.{name} = {getattr(prefix, name)}: an import begins as its model with "
                f"{name}={json.dumps(SEED[name])} alone; remove the field"
            )
    if not model.target_mlp and model.two_stream > 1:
        raise UserError("model.target_mlp = False: an import begins as its model with target_mlp=true alone")
    if prefix.kernel == "learned" or prefix.target_position:
        raise UserError("model.prefix has weights that the model lacks: kernel=gaussian and target_position=false")


def _equal(given: Any, value: Any, place: object) -> bool:
    """Whether a field of a configuration is that of a model; numbers of files in float32 are rounded."""
    if isinstance(value, dict):
        return config_files.validated({"model": {"rope": given}}, place).model.rope == RopeConfig(**value)
    if isinstance(value, float) and isinstance(given, float | int):
        return math.isclose(given, value, rel_tol=1e-6)
    return bool(given == value)


def adopt(model_dir: Path, run_dir: Path, path: Path | None, overrides: list[str]) -> tuple[RunConfig, Path]:
    """Begin a run with the model of a directory of transformers.

    Returns the configuration and checkpoint 0. ``path``: configuration of the run; None: its defaults. Raises
    ``UserError``, and then leaves ``run_dir`` as it was.
    """
    _check_place(run_dir)
    folder, values = Folder(model_dir), config_syntax.read(path, overrides)
    data = _section(values, path or model_dir, "data")
    tokenizer = tokenizers.load(model_dir, bos=data.get("bos_token"), eos=data.get("eos_token"))
    config = configuration(folder, tokenizer, run_dir, values, path or model_dir)
    model = config.model
    assert model.vocab_size is not None
    tokenizers.check_size(tokenizer, model.vocab_size)
    pairs = {pair.name: pair for pair in architectures.tensors(model)}
    kind = folder.check(list(pairs.values()))
    rows = dict.fromkeys(("embedding.weight", "head.weight"), model.padded_vocab)
    shapes = {name: (rows.get(name, pair.shape[0]), *pair.shape[1:]) for name, pair in pairs.items()}
    added = export.added(config, tokenizer.eos_id, shapes) if config.traits.streams == 2 else {}
    shapes |= {name: tuple(tensor.shape) for name, tensor in added.items()}

    def read(name: str) -> Tensor:
        return added[name] if name in added else folder.read(pairs[name])

    state = {"identity": configs.identity(config), "samples": 0, "losses": []}
    with export.replacing(run_dir) as partial:
        run = RunDirectory(partial)
        checkpoint.begin(run, shapes, read, state, averaged=config.optimizer.ema > 0)
        run.tokenizer.mkdir()
        tokenizers.copy(tokenizer, run.tokenizer)
        write_atomically(run.origin_path, json.dumps(_origin(folder, kind, tokenizer), indent=1) + "\n")
        config_files.save(config, run.config_path)
    return config, config.run_directory.checkpoint(0)


def _check_place(run_dir: Path) -> None:
    """``UserError`` unless a run directory does not exist or is empty."""
    if RunDirectory(run_dir).complete_checkpoints():
        raise UserError(f"{run_dir} already has checkpoints: choose another run directory")
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file: choose another run directory")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty: choose another run directory")


def _origin(folder: Folder, kind: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a run keeps of the pretrained model beside its weights."""
    kept = {name: value for name, value in folder.config.items() if name.endswith("_token_id") and value is not None}
    settings = folder.path / "generation_config.json"
    return {
        "model": folder.path.resolve().name,
        "architecture": architectures.name_of(folder.config),
        "dtype": kind,
        "bos": tokenizer.token(tokenizer.bos_id),
        "config": {**kept, "max_position_embeddings": architectures.longest(folder.config)},
        "generation_config": _json(settings, "cannot be read") if settings.is_file() else None,
    }


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
        origin = config.run_directory.origin()
        settings |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "dtype": kind}
        settings |= origin.get("config", {})
        write_atomically(partial / "config.json", json.dumps(settings, indent=1) + "\n")
        if origin.get("generation_config"):
            text = json.dumps(origin["generation_config"], indent=1) + "\n"
            write_atomically(partial / "generation_config.json", text)
        tokenizers.copy(tokenizer, partial)
    if tokenizer.path.suffix == ".model" and settings["model_type"].startswith("qwen"):
        log.warning("transformers encodes otherwise than %s: it has no sentencepiece for Qwen models", tokenizer.path)
    return {"parameters": parameters, "architecture": settings["architectures"][0], "dtype": kind}
