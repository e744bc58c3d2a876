"""Converts a training checkpoint to a model directory, and a model directory to a checkpoint (``to_training``).

A model directory holds ``config.json``, the weights as safetensors (large models: several files with an index), the
tokenizer, a model card and the model's code (see ``inference.folder``).

Memory is bounded: writing holds one file of weights, the comparison with the training model holds one layer.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from armd_scale import config as configs
from armd_scale import inference
from armd_scale.config import ModelConfig, ParallelConfig, RunConfig
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.shards import PackedDataset
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.errors import UserError
from armd_scale.inference import ARMDConfig, folder
from armd_scale.model.network import Stage
from armd_scale.objectives import interface as objectives
from armd_scale.parallel import groups
from armd_scale.rows import Rows
from armd_scale.training import checkpoint, manifest

TOLERANCE = 1e-3
"""Largest difference of float32 logits that two orders of summation can explain."""

FILE_BYTES = 2_000_000_000
"""Most bytes of weights in one file, unless a single tensor is larger."""


def newest_checkpoint(config: RunConfig) -> Path:
    """The newest complete checkpoint of a run, verified; ``UserError`` if none exists."""
    newest = config.run_directory.newest_checkpoint()
    if newest is None:
        raise UserError(f"{config.directory} has no complete checkpoint to export: train first")
    manifest.verify(newest)
    return newest


def standalone_config(model: ModelConfig, eos_id: int) -> ARMDConfig:
    """The configuration of the standalone model, which shares its field names with ``ModelConfig``."""
    return ARMDConfig(eos_id=eos_id, **model.exported())


def export(
    config: RunConfig, source: Path, out: Path, averaged: bool = True, file_bytes: int = FILE_BYTES
) -> dict[str, Any]:
    """Export checkpoint ``source`` to a temporary directory, check it, and move it to ``out``.

    ``averaged``: export the moving average of the weights if the checkpoint holds it. ``file_bytes``: largest size of a
    weight file. Returns the number of parameters, the name of the checkpoint and the largest difference between the
    logits of the exported model and of the training model. Raises ``UserError``.
    """
    manifest.check_identity(source, config)
    used = tokenizer(config)
    shape = standalone_config(config.model, used.eos_id)
    _check_output(_places(out)[0])
    with manifest.held(source), replacing(out) as partial:
        weights = checkpoint.Weights(source, averaged)
        shapes = standalone_shapes(weights, config.model)
        parameters = write_weights(
            shapes, lambda name: weights.read(name)[: shapes[name][0]].contiguous(), partial, file_bytes
        )
        facts: dict[str, Any] = {"tokenizer_sha256": tokenizers.digest(used), "checkpoint": source.name}
        folder.write_config(partial, shape, facts)
        tokenizers.copy(used, partial)
        folder.write_tokenizer_settings(partial, shape.length, used.token(shape.bos_id), used.token(shape.eos_id))
        folder.write_code(partial)
        difference = largest_difference(config, weights, partial)
        if not difference < TOLERANCE:
            raise _Mismatch(
                f"the logits of the exported model differ from those of the training model by {difference:.1e}: "
                f"the export stays in {partial} and {out.resolve()} is unchanged"
            )
        folder.write_config(partial, shape, facts | {"logits_difference": difference})
        facts = {"parameters": parameters, "checkpoint": source.name, "difference": difference}
        card = folder.card(config.name, shape, facts | _training_facts(config, source))
        (partial / "README.md").write_text(card, encoding="utf-8")
    return facts


class _Mismatch(UserError):
    """The exported model computes another function; its directory is kept."""


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A temporary directory that takes the place of ``out`` at the end. An error removes it and leaves ``out``."""
    out, partial, old = _places(out)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
        except _Mismatch:
            undo.pop_all()
            raise
        _flush(partial)
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def _places(out: Path) -> tuple[Path, Path, Path]:
    """The output directory, the one that is written, and the one that was replaced, which is put back if need be."""
    out = out.resolve()
    partial, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("partial", "old"))
    if old.exists() and not out.exists():  # an export died between its two renames
        os.replace(old, out)
    return out, partial, old


def tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of a run: that of its data, or of the imported model while there is no data.

    Raises ``UserError`` if it is not the tokenizer that the data was made with.
    """
    data = config.data_directory
    if not data.exists() and config.tokenizer and config.model.bos_id is not None:
        names = config.data.bos_token, config.data.eos_token
        return tokenizers.load(config.tokenizer, config.model.vocab_size, *names)
    used = tokenizers.load(data / "tokenizer", config.model.vocab_size)
    if tokenizers.digest(used) != PackedDataset(data / "train").index["tokenizer_sha256"]:
        raise UserError(f"{used.path} is not the tokenizer that {data} was made with: restore it")
    return used


def in_memory(config: RunConfig, source: Path, averaged: bool = True) -> tuple[inference.ARMD, Tokenizer]:
    """Load checkpoint ``source`` as a standalone model, with its tokenizer. Raises ``UserError``."""
    manifest.check_identity(source, config)
    used = tokenizer(config)
    with torch.device("meta"):
        model = inference.ARMD(standalone_config(config.model, used.eos_id))
    with manifest.held(source):
        weights = checkpoint.Weights(source, averaged)
        shapes = standalone_shapes(weights, config.model)
        model.load_state_dict({name: weights.read(name)[: shape[0]] for name, shape in shapes.items()}, assign=True)
    return model.requires_grad_(False).eval(), used


def to_training(model_dir: Path, config: RunConfig) -> Path:
    """Write the weights of a model directory as checkpoint 0 of the run of ``config``.

    The optimiser state is zero. A model without an adapter can get one. Raises ``UserError`` if model, tokenizer and
    configuration do not match, or if the run has checkpoints.
    """
    model = inference.load(model_dir)
    source = model.config
    tokenizer = tokenizers.load(model_dir, source.vocab_size)
    if config.data.tokenizer is None:
        raise UserError(f"data.tokenizer is not set, so the run would train its own: set data.tokenizer={model_dir}")
    given = tokenizers.load(config.data.tokenizer, bos=config.data.bos_token, eos=config.data.eos_token)
    if tokenizers.identity(given) != tokenizers.identity(tokenizer):
        raise UserError(f"{config.data.tokenizer} is not the model's tokenizer: set data.tokenizer={model_dir}")
    full = configs.with_vocabulary(config, source.vocab_size, source.bos_id)
    for name, value in vars(standalone_config(full.model, source.eos_id)).items():
        if value != getattr(source, name) and not (name == "adapter_rank" and not source.adapter_rank):
            raise UserError(
                f"the configuration has {name} = {value!r} but {model_dir} has {getattr(source, name)!r}: "
                "change the configuration"
            )
    if config.run_directory.complete_checkpoints():
        raise UserError(f"{config.directory} already has checkpoints: choose another run_dir")
    weights = model.state_dict()
    weights |= added(full, source.eos_id, weights)
    rows = {"embedding.weight": full.model.padded_vocab, "head.weight": full.model.padded_vocab}
    shapes = {name: (rows.get(name, len(tensor)), *tensor.shape[1:]) for name, tensor in weights.items()}
    state = {"identity": configs.identity(full), "samples": 0, "losses": []}
    state["tokenizer_sha256"] = tokenizers.digest(tokenizer)
    return checkpoint.begin(config.run_directory, shapes, weights.__getitem__, state, averaged=config.optimizer.ema > 0)


def added(config: RunConfig, eos_id: int, known: Collection[str]) -> dict[str, torch.Tensor]:
    """Weights beside ``known``, which a run has more than the model that it begins with: gates, an adapter."""
    model, generator = config.model, torch.Generator().manual_seed(config.seed)
    with torch.device("meta"):
        network = inference.ARMD(standalone_config(model, eos_id))
    weights = {}
    for name, param in network.named_parameters():
        if name in known:
            continue
        tensor = torch.zeros(param.shape)
        if name == "prefix.gate":
            assert model.prefix.gate is not None
            tensor.fill_(model.prefix.gate)
        elif name == "prefix.draft_seed":
            tensor.normal_(std=model.init_std, generator=generator)
        elif name.endswith("_adapter.a"):
            tensor.normal_(std=param.shape[1] ** -0.5, generator=generator)
        weights[name] = tensor
    return weights


def _training_facts(config: RunConfig, source: Path) -> dict[str, Any]:
    """Facts about the training up to a checkpoint, for the model card."""
    step = manifest.read(source)["step"]
    objective = objectives.training(config.objective)
    keys = {label: f"heldout_{kind}_bits_per_byte" for kind, label in objective.kinds(config).items()}
    scores = [record for record in config.run_directory.metrics() if next(iter(keys.values())) in record]
    newest = max((score for score in scores if score["step"] <= step), key=lambda score: score["step"], default={})
    heldout = {label: newest[key] for label, key in keys.items() if key in newest}
    return {
        "tokens": step * config.train.global_batch * config.model.length,
        "text": ", ".join(config.data.text) or str(config.data_directory),
        "heldout": heldout,
        "origin": config.run_directory.origin(),
    }


def _check_output(out: Path) -> None:
    """``UserError`` unless ``out`` does not exist, is empty, or holds an exported model and nothing else."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    strange = [name for name in sorted(names) if not folder.FILES.fullmatch(name)]
    if strange or (names and not {"config.json", "modeling_armd.py"} <= names):
        reason = (
            f"holds {strange[0]}, which no export writes"
            if strange and "config.json" in names
            else "is not a model directory"
        )
        raise UserError(f"{out} exists and {reason}: choose another output directory")


def _flush(directory: Path) -> None:
    """Flush a directory and its files to the disk."""
    for path in [*directory.iterdir(), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def standalone_shapes(weights: checkpoint.Weights, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a checkpoint without the padding of the vocabulary."""
    assert model.vocab_size is not None
    rows = {"embedding.weight": model.symbols, "head.weight": model.vocab_size}
    return {name: (rows.get(name, shape[0]), *shape[1:]) for name, shape in weights.shapes.items()}


def write_weights(
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    directory: Path,
    file_bytes: int,
    width: int = 4,
) -> int:
    """Write safetensors files of weights of ``width`` bytes, with one file in memory; returns their number.

    ``read``: a weight by its name. ``file_bytes``: most bytes of a file.
    """
    sizes = {name: width * int(np.prod(shape)) for name, shape in shapes.items()}
    files: list[list[str]] = [[]]
    for name, size in sizes.items():
        if files[-1] and sum(sizes[other] for other in files[-1]) + size > file_bytes:
            files.append([])
        files[-1].append(name)
    file_of: dict[str, str] = {}
    umask = os.umask(0)
    os.umask(umask)
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        save_file({name: read(name) for name in names}, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o666 & ~umask)  # safetensors gives the owner alone access
        file_of |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return sum(sizes.values()) // width


def largest_difference(config: RunConfig, weights: checkpoint.Weights, out: Path) -> float:
    """Largest absolute difference between the float32 logits of the training model and of the exported model.

    Builds the Megatron-Core layers in one process, layer by layer, with the weights of the checkpoint. Both models
    compute the ``probes`` of the objective on one held-out sample.
    """
    model = config.model
    tokens = _sample(config)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    exported = inference.load(out)  # on the CPU, where its weights are mapped files
    probes = objectives.training(config.objective).probes(model, tokens)
    exported_logits = [logits(exported) for _, logits in probes]
    differences = []
    batches = [rows.to(device) for rows, _ in probes]
    for logits, trained in zip(exported_logits, _trained_logits(model, weights, batches, device), strict=True):
        differences.append((logits - trained.cpu()).abs().max())
    return float(torch.stack(differences).max())  # a tensor's maximum keeps a NaN


def _sample(config: RunConfig) -> np.ndarray:
    """A held-out text [1, N], or random tokens while there is no data."""
    if config.data_directory.exists():
        return PackedDataset(config.data_directory / "heldout").read([0])
    assert config.model.vocab_size is not None
    return np.random.default_rng(0).integers(0, config.model.vocab_size, (1, config.model.length))


@torch.no_grad()
def _trained_logits(
    model: ModelConfig, weights: checkpoint.Weights, batches: list[Rows], device: torch.device
) -> Iterator[torch.Tensor]:
    """Logits [N, V] of the first text of each batch."""
    single = ParallelConfig()
    with tempfile.TemporaryDirectory() as directory:
        groups.start(single, rank=0, processes=1, rendezvous=f"{directory}/store", device=device)
        try:
            parallel = groups.transformer_config(model, single, torch.float32)
            received: list[torch.Tensor | None] = [None] * len(batches)
            for first, last in itertools.pairwise(range(model.layers + 1)):
                stage = Stage(model, parallel, first, last).to(device)
                for name, param in stage.named_parameters():
                    param.copy_(weights.read(name))
                for number, rows in enumerate(batches):
                    stage.set_input_tensor(received[number])
                    received[number] = stage.hidden(rows)
            for hidden in received:
                assert hidden is not None
                yield stage.logits(hidden)[:, 0, : model.vocab_size]
        finally:
            groups.stop()
