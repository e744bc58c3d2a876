"""A study: variants of a run with the same text, tokenizer, optimiser and number of tokens, each with several seeds.

- ``Study``, ``load``: the study file;
- ``Run``, ``runs``: the runs of a study;
- ``measure``: the figures of a trained run, from which ``study_page`` writes the page.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationError

from armd_scale import config_files, config_syntax
from armd_scale.config import Count, Objective, Positive, RunConfig, Section
from armd_scale.data.shards import PackedDataset, fill_vocabulary
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.errors import UserError
from armd_scale.evaluation import generation, likelihood, suites
from armd_scale.evaluation.models import alone, open_model
from armd_scale.files import write_atomically
from armd_scale.inference import ARMD
from armd_scale.model.flops import training_flops_per_token
from armd_scale.objectives import interface as objectives
from armd_scale.run_directory import RunDirectory

MAIN = "armd"
"""The main variant of a study."""
DIFFUSION = "mdm"
OBJECTIVES: tuple[Objective, ...] = ("ar", MAIN, DIFFUSION)
"""Variants that are the subject of a study, the first two of every study."""
JUDGE = "judge"
"""The variant that scores the texts of ``OBJECTIVES``; without it no texts are generated."""


class Variant(Section):
    """A variant of the run of a study."""

    set: list[str] = Field(default=[])
    """Overrides of the study's run, ``section.field=value``."""
    seeds: list[Count] | None = None
    """Seeds; null: the seeds of the study."""
    question: str = ""
    """The decision that this variant ablates; the page groups variants by question."""
    beside: str = MAIN
    """The base variant of an ablation."""


class Study(Section):
    """A study file."""

    name: str
    """Name of the study."""
    run: dict[str, Any]
    """Configuration that all runs share, as in a file of ``configs/``; ``train.steps`` are the equal steps."""
    variants: dict[str, Variant]
    """Variants by name: ``ar`` and ``armd``; if wanted ``mdm`` and ``judge`` (a left-to-right model that scores texts);
    and ablations of ``armd``."""
    seeds: list[Count] = Field(default=[0, 1, 2], min_length=2)
    """Seeds of the variants without seeds of their own."""
    slots: Positive = 1
    """Number of runs trained at the same time."""
    heldout_samples: Positive = 1024
    """Number of held-out samples for the likelihood."""
    texts: Positive = 256
    """Number of texts generated with each decoding setting."""
    streams: list[Positive] = Field(default=[1, 2, 4, 8])
    """Numbers of tokens per step at which texts are compared."""
    suite_chunks: Positive | None = 256
    """Number of chunks of each text of the zero-shot suite; null: all."""

    def equal_steps(self, run_configs: "dict[Run, RunConfig]") -> int:
        """The number of steps at which variants are compared: the base training of ``armd``."""
        return next(config.train.steps for run, config in run_configs.items() if run.variant == MAIN)

    def config(self, run: "Run", directory: Path, overrides: list[str]) -> RunConfig:
        """The configuration of a run in the directory of the study; ``UserError`` if it is not valid."""
        return config_files.load(directory / "run.yaml", [*overrides, *self.overrides(run, directory)])

    def overrides(self, run: "Run", directory: Path) -> list[str]:
        """Overrides of the shared configuration for a run."""
        run_dir = f"run_dir={directory / 'runs' / run.name}"
        return [*self.variants[run.variant].set, f"seed={run.seed}", f"name={run.name}", run_dir]


class Run(NamedTuple):
    """A variant with a seed."""

    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{''.join(c if c.isalnum() else '-' for c in self.variant)}-{self.seed}"


def load(path: Path) -> Study:
    """Read a study file; ``UserError`` if it is not valid."""
    if not path.is_file():
        raise UserError(f"no study file {path}: see configs/fidelity/")
    try:
        study = Study.model_validate(config_syntax.read(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    wanted = (*OBJECTIVES[:2], *(variant.beside for variant in study.variants.values()))
    missing = [name for name in wanted if name not in study.variants]
    if missing:
        raise UserError(f"{path}: a study needs the variant '{missing[0]}': add it")
    if 1 not in study.streams:
        raise UserError(f"{path}: streams must hold 1, the base of the comparison: add it")
    for name, variant in study.variants.items():
        extra = set(variant.seeds or study.seeds) - set(study.variants[variant.beside].seeds or study.seeds)
        if extra and name != JUDGE:
            raise UserError(f"{path}: '{name}' has the seed {min(extra)} but '{variant.beside}' does not: add it there")
    names = [run.name for run in runs(study)]
    if len(set(names)) < len(names):
        shared = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: two runs share the directory {shared}: rename a variant")
    return study


def runs(study: Study) -> list[Run]:
    """All runs of a study."""
    return [Run(name, seed) for name, variant in study.variants.items() for seed in variant.seeds or study.seeds]


def measure(study: Study, run: Run, folder: Path, equal: int, judge: Path | None, suite: Path | None) -> dict[str, Any]:
    """Measure the trained run in the run directory ``folder``.

    ``equal``: number of steps at which variants are compared; ``judge``: run directory of the judge, if the study has
    one; ``suite``: directory of the zero-shot texts. Raises ``UserError``.
    """
    config = fill_vocabulary(config_files.load_run(RunDirectory(folder)))
    torch.set_num_threads(1 if study.slots > 1 else torch.get_num_threads())
    device = "cuda" if config.cluster.gpus_per_node else "cpu"
    records = config.run_directory.metrics()
    known_by = f"heldout_{next(iter(objectives.training(config.objective).kinds(config)))}"
    tokens_a_step = config.train.global_batch * config.model.length
    steps = [record for record in records if "loss" in record]
    out: dict[str, Any] = {
        "objective": config.objective,
        "steps": config.total_steps,
        "tokens_per_step": tokens_a_step,
        "flops_per_token": training_flops_per_token(config.model),
        "tokens_per_second": float(np.median([record["tokens_per_second"] for record in steps])),
        "curve": [[record["step"], record[known_by]] for record in records if known_by in record],
        "checkpoints": {},
    }
    subject = run.variant in OBJECTIVES
    scorer = generation.load_judge(judge, device) if subject and judge else None
    for step, checkpoint in _checkpoints(run, config, equal).items():
        model, tokenizer = open_model(checkpoint, device)
        figures: dict[str, Any] = {"heldout": _heldout(study, run, config, model)}
        if scorer:
            figures["texts"] = _texts(study, model, tokenizer, scorer)
        if subject and suite and step in (equal, config.train.steps):
            figures["suite"] = _suite(study, model, tokenizer, suite)
        out["checkpoints"][str(step)] = figures
    out["parameters"] = sum(p.numel() for p in model.parameters())
    return out


def _checkpoints(run: Run, config: RunConfig, equal: int) -> dict[int, Path]:
    """Measured checkpoints by step: at the equal steps, during strided fine-tuning, and the last checkpoint."""
    kept = range(equal, config.total_steps + 1, config.train.keep_every or config.total_steps)
    between = kept if run.variant == MAIN else ()
    steps = sorted({min(equal, config.total_steps), *between, config.total_steps})
    checkpoints = {step: config.run_directory.checkpoint(step) for step in steps}
    missing = [str(path) for path in checkpoints.values() if not path.is_dir()]
    if missing:
        raise UserError(f"{missing[0]} is missing: set train.checkpoint_every and train.keep_every to keep it")
    return checkpoints


def _heldout(study: Study, run: Run, config: RunConfig, model: ARMD) -> dict[str, Any]:
    """Nats per token of held-out samples spread over the split."""
    data = PackedDataset(config.data_directory / "heldout")
    count = min(study.heldout_samples, len(data))
    chunks = data.sequences(np.arange(count) * len(data) // count, config.data.documents == "separate")
    size = data.bytes_per_token * sum(map(len, chunks))
    names = likelihood.default_orders(model)
    if config.traits.phases:
        few, length = max(1, config.model.length // 16), config.model.length
        names = ["left-to-right", f"shuffled:{few}", f"shuffled:{length}"]
        names += [f"strided:{s}" for s in (study.streams if run.variant == MAIN else [4]) if s > 1]
    return {name: likelihood.score(alone(model), chunks, name, size).as_dict() for name in names}


def _texts(study: Study, model: ARMD, tokenizer: Tokenizer, judge: generation.Judge) -> list[dict[str, Any]]:
    """Quality of generated texts for each number of tokens per step."""
    length, out = model.config.length, []
    for streams, decoding in generation.ways(model, study.streams, length).items():
        sample = generation.sample(model, decoding, study.texts, length, batch=64)
        figures = generation.quality([tokenizer.decode(text) for text in sample.tokens], sample.tokens, judge)
        out.append({"tokens_a_step": streams, "tokens_per_second": sample.tokens_per_second, **figures.as_dict()})
    return out


def _suite(study: Study, model: ARMD, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Zero-shot scores of the texts in ``folder``."""
    out = {}
    order = likelihood.default_orders(model)[0]
    for text in suites.SETS.values():
        path = suites.find(text, folder)
        if path is None:
            continue
        documents, size = suites.read(text, path, suites.Protocol())
        chunks, _ = suites.chunks(documents, tokenizer, model.config.length, suites.Protocol())
        part = chunks[: study.suite_chunks]
        share = sum(map(len, part)) / sum(map(len, chunks))
        out[text.name] = likelihood.score(alone(model), part, order, size * share).as_dict()
    return out


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the figures of a study as JSON, with six significant digits."""
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    write_atomically(path, json.dumps(rounded, indent=1) + "\n")
