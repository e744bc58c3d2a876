"""A study: variants of one run on the same text, tokenizer, optimiser and number of tokens, some seeds of each.

- ``Study``: the file, typed; ``load``;
- ``Run``, ``runs``: what is trained;
- ``measure``: everything that is asked of a trained run, as plain numbers; ``study_page`` makes the page of it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from pydantic import Field, ValidationError

from armd_scale import config as configs
from armd_scale.config import Count, Objective, Positive, RunConfig, Section
from armd_scale.data.shards import PackedDataset
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
"""The variant that a study is about."""
OBJECTIVES: tuple[Objective, ...] = ("ar", MAIN, "mdm")
"""Variants that every study has, under these names; ``judge`` is the fourth."""


class Variant(Section):
    """One way to train."""

    set: list[str] = Field(default=[])
    """Overrides of the study's run, ``section.field=value``."""
    seeds: list[Count] | None = None
    """Seeds; null: those of the study."""
    question: str = ""
    """The decision that it is an ablation of; variants of one question stand together on the page."""
    beside: str = MAIN
    """The variant that an ablation is compared with."""


class Study(Section):
    """A study file."""

    name: str
    """Name of the study."""
    run: dict[str, Any]
    """The configuration that all runs share, as in a file of ``configs/``; ``train.steps`` are the equal steps."""
    variants: dict[str, Variant]
    """What is compared: ``ar``, ``armd``, ``mdm`` and ``judge`` (a left-to-right model that scores texts), and
    ablations of ``armd``."""
    seeds: list[Count] = Field(default=[0, 1, 2], min_length=2)
    """Seeds of every variant that names none."""
    slots: Positive = 1
    """Runs side by side."""
    heldout_samples: Positive = 1024
    """Held-out samples that the trained models are scored on."""
    texts: Positive = 256
    """Texts of every way of decoding."""
    streams: list[Positive] = Field(default=[1, 2, 4, 8])
    """Tokens a step at which texts are compared."""
    suite_chunks: Positive | None = 256
    """Chunks of every text of the zero-shot suite; null: all."""

    def equal_steps(self, made: "dict[Run, RunConfig]") -> int:
        """The steps at which variants are compared: the base training of ``armd``."""
        return next(config.train.steps for run, config in made.items() if run.variant == MAIN)

    def config(self, run: "Run", directory: Path, overrides: list[str]) -> RunConfig:
        """The configuration of a run in the study's directory; ``UserError`` on anything wrong."""
        return configs.load(directory / "run.yaml", [*overrides, *self.overrides(run, directory)])

    def overrides(self, run: "Run", directory: Path) -> list[str]:
        """What makes the shared configuration that of a run."""
        place = f"run_dir={directory / 'runs' / run.name}"
        return [*self.variants[run.variant].set, f"seed={run.seed}", f"name={run.name}", place]


class Run(NamedTuple):
    """A variant with a seed."""

    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{''.join(c if c.isalnum() else '-' for c in self.variant)}-{self.seed}"


def load(path: Path) -> Study:
    """Read a study file; ``UserError`` on anything wrong."""
    if not path.is_file():
        raise UserError(f"there is no study file {path}; see configs/fidelity/")
    try:
        study = Study.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    wanted = (*OBJECTIVES, "judge", *(variant.beside for variant in study.variants.values()))
    missing = [name for name in wanted if name not in study.variants]
    if missing:
        raise UserError(f"{path}: a study needs the variant '{missing[0]}'")
    if 1 not in study.streams:
        raise UserError(f"{path}: streams must hold 1, beside which the others are set")
    for name, variant in study.variants.items():
        left = set(variant.seeds or study.seeds) - set(study.variants[variant.beside].seeds or study.seeds)
        if left and name != "judge":
            raise UserError(f"{path}: '{name}' has the seed {min(left)}, which '{variant.beside}' has not")
    names = [run.name for run in runs(study)]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two runs would share the directory {next(n for n in names if names.count(n) > 1)}")
    return study


def runs(study: Study) -> list[Run]:
    """All runs of a study."""
    return [Run(name, seed) for name, one in study.variants.items() for seed in one.seeds or study.seeds]


def measure(study: Study, run: Run, folder: Path, equal: int, judge: Path, suite: Path | None) -> dict[str, Any]:
    """Everything that is asked of the trained run in ``folder``.

    ``equal``: the steps at which variants are compared; ``judge``: the directory of another run; ``suite``: that of the
    zero-shot texts. Raises ``UserError``.
    """
    config = RunDirectory(folder).load_config(vocabulary=True)
    torch.set_num_threads(1 if study.slots > 1 else torch.get_num_threads())
    device = "cuda" if config.cluster.gpus_per_node else "cpu"
    records = config.run_directory.metrics()
    known_by = f"heldout_{objectives.training(config.objective).heldout[0]}"
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
    scorer = generation.load_judge(judge, device) if run.variant in OBJECTIVES else None
    for step, place in _checkpoints(run, config, equal).items():
        model, tokenizer = open_model(place, device)
        found: dict[str, Any] = {"heldout": _heldout(study, run, config, model)}
        if scorer:
            found["texts"] = _texts(study, model, tokenizer, scorer)
        if scorer and suite and step in (equal, config.train.steps):
            found["suite"] = _suite(study, model, tokenizer, suite)
        out["checkpoints"][str(step)] = found
    out["parameters"] = sum(p.numel() for p in model.parameters())
    return out


def _checkpoints(run: Run, config: RunConfig, equal: int) -> dict[int, Path]:
    """Checkpoints that are measured, by their steps: at equal steps, the last, and those of strided fine-tuning."""
    kept = range(equal, config.total_steps + 1, config.train.keep_every or config.total_steps)
    between = kept if run.variant == MAIN else ()
    found = sorted({min(equal, config.total_steps), *between, config.total_steps})
    places = {step: config.run_directory.checkpoint(step) for step in found}
    missing = [str(place) for place in places.values() if not place.is_dir()]
    if missing:
        raise UserError(f"{missing[0]} is not there: train.checkpoint_every and keep_every must keep it")
    return places


def _heldout(study: Study, run: Run, config: RunConfig, model: ARMD) -> dict[str, Any]:
    """Nats per token of held-out samples spread over the split."""
    data = PackedDataset(config.data_directory / "heldout")
    count = min(study.heldout_samples, len(data))
    chunks = list(data.read(np.arange(count) * len(data) // count))
    size = data.bytes_per_token * sum(map(len, chunks))
    names = likelihood.default_orders(model)
    if config.traits.phases:
        few, length = max(1, config.model.length // 16), config.model.length
        names = ["left-to-right", f"shuffled:{few}", f"shuffled:{length}"]
        names += [f"strided:{s}" for s in (study.streams if run.variant == MAIN else [4]) if s > 1]
    return {name: likelihood.score(alone(model), chunks, name, size).as_dict() for name in names}


def _texts(study: Study, model: ARMD, tokenizer: Tokenizer, judge: generation.Judge) -> list[dict[str, Any]]:
    """Quality of generated texts at so many tokens a step."""
    length, out = model.config.length, []
    for streams, decoding in generation.ways(model, study.streams, length).items():
        made = generation.sample(model, decoding, study.texts, length, batch=64)
        figures = generation.quality([tokenizer.decode(one) for one in made.tokens], made.tokens, judge)
        out.append({"tokens_a_step": streams, "tokens_per_second": made.tokens_per_second, **figures.as_dict()})
    return out


def _suite(study: Study, model: ARMD, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Zero-shot scores of the texts that are there."""
    out = {}
    order = likelihood.default_orders(model)[0]
    for text in suites.SETS.values():
        found = suites.find(text, folder)
        if found is None:
            continue
        documents, size = suites.read(text, found, suites.Protocol())
        chunks = suites.chunks(documents, tokenizer, model.config.length, suites.Protocol())
        part = chunks[: study.suite_chunks]
        share = sum(map(len, part)) / sum(map(len, chunks))
        out[text.name] = likelihood.score(alone(model), part, order, size * share).as_dict()
    return out


def write_results(path: Path, results: dict[str, Any]) -> None:
    """The figures of a study as JSON, numbers with six digits."""
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    write_atomically(path, json.dumps(rounded, indent=1) + "\n")
