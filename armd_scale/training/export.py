"""Training checkpoint -> standalone model folder, and back to train on (``to_training``).

The folder holds ``config.json``, the weights in safetensors (in several files, with an index, when they are large), the
tokenizer, a model card, and the model's code, generated from this project's (``inference.folder``).

Memory is bounded: one file of weights when writing, one layer when comparing with the training model.
"""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
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
    """The newest complete checkpoint of a run, verified; ``UserError`` when there is none."""
    found = config.run_directory.newest_checkpoint()
    if found is None:
        raise UserError(f"{config.directory} has no complete checkpoint to export: train first")
    manifest.verify(found)
    return found


def standalone_config(model: ModelConfig, eos_id: int) -> ARMDConfig:
    """The standalone model's description of a training model: every field of the same name."""
    return ARMDConfig(eos_id=eos_id, **model.exported())


def export(
    config: RunConfig, source: Path, out: Path, averaged: bool = True, file_bytes: int = FILE_BYTES
) -> dict[str, Any]:
    """Write the model of checkpoint ``source`` to ``out`` and check it; what ``out`` held is replaced only after that.

    ``averaged``: the moving average of the weights where the checkpoint holds it. ``file_bytes``: most bytes of weights
    in a file. Returns what was written, and the largest difference of its logits to the training model's. Raises
    ``UserError``.
    """
    manifest.check_identity(source, config)
    out = out.resolve()
    data = config.data_directory
    tokenizer = tokenizers.load(data / "tokenizer", config.model.vocab_size)
    if tokenizers.digest(tokenizer) != PackedDataset(data / "train").index["tokenizer_sha256"]:
        raise UserError(f"{tokenizer.path} is not the tokenizer that {data} was made with: restore it")
    shape = standalone_config(config.model, tokenizer.eos_id)
    partial, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("partial", "old"))
    if old.exists() and not out.exists():  # an export died between its two renames
        os.replace(old, out)
    _check_place(out)
    for place in (partial, old):
        shutil.rmtree(place, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = checkpoint.Weights(source, averaged)
    parameters = _write_weights(weights, config.model, partial, file_bytes)
    facts: dict[str, Any] = {"tokenizer_sha256": tokenizers.digest(tokenizer), "checkpoint": source.name}
    folder.write_config(partial, shape, facts)
    tokenizers.copy(tokenizer, partial)
    folder.write_tokenizer_settings(partial, shape.length, tokenizer.token(shape.bos_id), tokenizer.token(shape.eos_id))
    folder.write_code(partial)
    difference = largest_difference(config, weights, partial)
    if not difference < TOLERANCE:
        raise UserError(
            f"the exported model's logits differ from the training model's by {difference:.1e}: "
            f"nothing was replaced; what was written is in {partial}"
        )
    folder.write_config(partial, shape, facts | {"logits_difference": difference})
    facts = {"parameters": parameters, "checkpoint": source.name, "difference": difference}
    card = folder.card(config.name, shape, facts | _training_facts(config, source))
    (partial / "README.md").write_text(card, encoding="utf-8")
    _flush(partial)
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)
    return facts


def in_memory(config: RunConfig, source: Path, averaged: bool = True) -> tuple[inference.ARMD, Tokenizer]:
    """The standalone model of checkpoint ``source``, and its tokenizer, without a folder. Raises ``UserError``."""
    manifest.check_identity(source, config)
    tokenizer = tokenizers.load(config.data_directory / "tokenizer", config.model.vocab_size)
    weights = checkpoint.Weights(source, averaged)
    with torch.device("meta"):
        model = inference.ARMD(standalone_config(config.model, tokenizer.eos_id))
    shapes = standalone_shapes(weights, config.model)
    model.load_state_dict({name: weights.read(name)[: shape[0]] for name, shape in shapes.items()}, assign=True)
    return model.requires_grad_(False).eval(), tokenizer


def to_training(model_dir: Path, config: RunConfig) -> Path:
    """Begin the run of ``config`` with the weights of a model folder: its checkpoint of step 0.

    The optimiser starts anew. Raises ``UserError`` when model, tokenizer and configuration do not belong together, or
    the run has checkpoints already.
    """
    model = inference.load(model_dir)
    found, eos_id = model.config, model.config.eos_id
    tokenizer = tokenizers.load(model_dir, found.vocab_size)
    if config.data.tokenizer is None:
        raise UserError(f"the run would train a tokenizer of its own: set data.tokenizer={model_dir}")
    if tokenizers.digest(tokenizers.load(config.data.tokenizer)) != tokenizers.digest(tokenizer):
        raise UserError(f"{config.data.tokenizer} is not the model's tokenizer: set data.tokenizer={model_dir}")
    full = configs.with_vocabulary(config, found.vocab_size, found.bos_id)
    for name, value in vars(standalone_config(full.model, eos_id)).items():
        if value != getattr(found, name):
            raise UserError(f"the configuration's model has {name} = {value!r}, {model_dir} {getattr(found, name)!r}")
    if config.run_directory.complete_checkpoints():
        raise UserError(f"{config.directory} has checkpoints already: choose another run_dir")
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for name in weights.keys() & {"embedding.weight", "head.weight"}:
        rows = full.model.padded_vocab - len(weights[name])
        weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, rows))
    state = {"identity": configs.identity(full), "samples": 0, "losses": []}
    state["tokenizer_sha256"] = tokenizers.digest(tokenizer)
    return checkpoint.begin(config.run_directory, weights, state, averaged=config.optimizer.ema > 0)


def _training_facts(config: RunConfig, source: Path) -> dict[str, Any]:
    """What the model card says of the training up to a checkpoint."""
    step = manifest.read(source)["step"]
    objective = objectives.training(config.objective)
    known_by = f"heldout_{objective.heldout[0]}_bits_per_byte"
    scores = [record for record in config.run_directory.metrics() if known_by in record]
    kinds = {label: kind for kind, label in objective.labels(config).items()}
    newest = max((one for one in scores if one["step"] <= step), key=lambda one: one["step"], default=None)
    heldout = {kind: newest[f"heldout_{name}_bits_per_byte"] for kind, name in kinds.items()} if newest else {}
    return {
        "tokens": step * config.train.global_batch * config.model.length,
        "text": ", ".join(config.data.text) or str(config.data_directory),
        "heldout": heldout,
    }


def _check_place(out: Path) -> None:
    """``UserError`` unless ``out`` is free, empty, or a model folder that holds nothing else."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    strange = [name for name in sorted(names) if not folder.FILES.fullmatch(name)]
    if strange or (names and not {"config.json", "modeling_armd.py"} <= names):
        what = (
            f"holds {strange[0]}, which no export writes"
            if strange and "config.json" in names
            else "is no model folder"
        )
        raise UserError(f"{out} exists and {what}: choose another place")


def _flush(place: Path) -> None:
    """Have the files of a folder, and their names, on the disk."""
    for path in [*place.iterdir(), place]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def standalone_shapes(weights: checkpoint.Weights, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's weights without the padding of the vocabulary."""
    assert model.vocab_size is not None
    rows = {"embedding.weight": model.symbols, "head.weight": model.vocab_size}
    return {name: (rows.get(name, shape[0]), *shape[1:]) for name, shape in weights.shapes.items()}


def _write_weights(weights: checkpoint.Weights, model: ModelConfig, place: Path, file_bytes: int) -> int:
    """Write safetensors files named as transformers does; returns the number of parameters."""
    shapes = standalone_shapes(weights, model)
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
    files: list[list[str]] = [[]]
    for name, size in sizes.items():
        if files[-1] and sum(sizes[other] for other in files[-1]) + size > file_bytes:
            files.append([])
        files[-1].append(name)
    places: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        tensors = {name: weights.read(name)[: shapes[name][0]].contiguous() for name in names}
        save_file(tensors, place / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (place / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return sum(sizes.values()) // 4


def largest_difference(config: RunConfig, weights: checkpoint.Weights, out: Path) -> float:
    """Largest absolute difference between the logits of the training model and of the exported one, both float32.

    The training model is built on one process from the Megatron-Core layers, one layer after the other, and given the
    weights of the checkpoint; both compute the ``probes`` of the objective on one held-out sample.
    """
    model = config.model
    tokens = PackedDataset(config.data_directory / "heldout").read([0])
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    exported = inference.load(out)  # on the CPU, where its weights are mapped files
    probes = objectives.training(config.objective).probes(model, tokens)
    found = [logits(exported) for _, logits in probes]
    differences = []
    batches = [rows.to(device) for rows, _ in probes]
    for logits, trained in zip(found, _trained_logits(model, weights, batches, device), strict=True):
        differences.append((logits - trained.cpu()).abs().max())
    return float(torch.stack(differences).max())  # a tensor's maximum keeps a NaN


@torch.no_grad()
def _trained_logits(
    model: ModelConfig, weights: checkpoint.Weights, batches: list[Rows], device: torch.device
) -> Iterator[torch.Tensor]:
    """Logits [N, V] of the first text of every batch."""
    single = ParallelConfig()
    with tempfile.TemporaryDirectory() as place:
        groups.start(single, rank=0, processes=1, rendezvous=f"{place}/store", device=device)
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
