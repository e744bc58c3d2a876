"""The report of a finished run: ``summary.json``, ``samples.md`` and ``loss.png``.

The report compares the model's bits per byte with two simple models of the same held-out bytes: xz, and the unigram
frequencies of the training text.
"""

import json
import lzma
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from armd_scale import inference
from armd_scale.config import RunConfig
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.shards import PackedDataset
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.evaluation import generation, likelihood
from armd_scale.evaluation.models import alone
from armd_scale.files import write_atomically
from armd_scale.model.flops import training_flops_per_token
from armd_scale.objectives import interface as objectives
from armd_scale.run_directory import RunDirectory
from armd_scale.training.telemetry import environment

_DRAFTED_TEXTS = 8  # held-out texts whose drafts are judged
_UNIGRAM_SAMPLES = 100_000  # training samples whose tokens are counted


def write(config: RunConfig, export: Path) -> dict[str, Any]:
    """Evaluate the exported model of a run, generate with it, and write the report; returns the summary."""
    run = config.run_directory
    train, heldout = (PackedDataset(config.data_directory / split) for split in ("train", "heldout"))
    model, tokenizer = inference.load(export), tokenizers.load(export)
    separate, count = config.data.documents == "separate", min(len(heldout), config.report.heldout_samples)
    chunks = heldout.sequences(np.arange(count), separate)
    if count == len(heldout):
        chunks += heldout.tail_sequences(separate)
    tokens = np.concatenate(chunks)
    # Exact for the whole split, proportional for a part of the split.
    size = heldout.bytes_per_token * len(tokens)
    objective = objectives.training(config.objective)
    names = likelihood.default_orders(model)[:1] + objective.report_orders(config)
    scores = [likelihood.score(alone(model), chunks, name, size) for name in names]
    samples = _samples(config, model, tokenizer)
    exported = json.loads((export / "config.json").read_text(encoding="utf-8"))
    metrics = run.metrics()
    steps = [record for record in metrics if "loss" in record]
    summary: dict[str, Any] = {
        "name": config.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps[-1]["step"] if steps else 0,
        "tokens": steps[-1]["tokens"] if steps else 0,
        "training_flops_per_token": training_flops_per_token(config.model),
        "training_flops_formula": objective.flops_formula,
        "tokens_per_second": float(np.median([record["tokens_per_second"] for record in steps])) if steps else None,
        "heldout_tokens": len(tokens),
        "heldout_bytes": round(size),
        "heldout": [score.as_dict() for score in scores],
        "drafts": _drafts(model, chunks),
        "xz_bits_per_byte": xz_bits_per_byte(_text(tokens, tokenizer)),
        "unigram_bits_per_byte": unigram_bits_per_byte(train, tokens, size),
        "samples": [{k: sample[k] for k in ("streams", "steps", "seconds", "tokens_per_second")} for sample in samples],
        "sample_text": samples[-1]["text"],
        "checkpoint": exported["checkpoint"],
        "export_difference": exported["logits_difference"],
        "environment": environment(),
    }
    write_atomically(run.summary_path, json.dumps(summary, indent=1) + "\n")
    write_atomically(run.samples_page_path, _samples_page(config, samples))
    plot(config, metrics, summary, run.loss_plot_path)
    return summary


def xz_bits_per_byte(text: bytes) -> float:
    """Size of a text compressed by xz with its best preset, in bits per byte."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / max(1, len(text))


def unigram_bits_per_byte(train: PackedDataset, tokens: np.ndarray, text_bytes: float) -> float:
    """Bits per byte of held-out tokens under the unigram frequencies of the training tokens, add-one smoothed."""
    counts = np.ones(train.index["vocab_size"])
    for start in range(0, min(len(train), _UNIGRAM_SAMPLES), 4096):
        numbers = np.arange(start, min(start + 4096, len(train), _UNIGRAM_SAMPLES))
        counts += np.bincount(train.read(numbers).ravel(), minlength=len(counts))
    return float(-np.log2(counts / counts.sum())[tokens].sum() / text_bytes)


def _drafts(model: inference.ARMD, chunks: list[np.ndarray]) -> dict[str, Any] | None:
    """How exact parallel decoding would accept drafts of held-out texts; None for models without draft rows."""
    texts = [chunk.tolist() for chunk in chunks if len(chunk) == model.config.length][:_DRAFTED_TEXTS]
    if "draft" not in model.config.traits.settings or not texts:
        return None
    accepted, written = generation.acceptance(model, texts)
    return {"texts": len(texts), "acceptance": accepted, "tokens_per_pass": written}


def _text(tokens: np.ndarray, tokenizer: Tokenizer) -> bytes:
    return tokenizer.decode(tokens.tolist()).encode("utf-8", "replace")


def _samples(config: RunConfig, model: inference.ARMD, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    prompt = tokenizer.encode(config.report.prompt)
    free = model.config.length - len(prompt)
    model.generate([prompt])  # warm-up
    samples = []
    for streams, decoding in generation.ways(model, config.report.generate_streams, free).items():
        started = time.perf_counter()
        [task] = model.plan([prompt + [inference.FREE] * free], decoding, config.seed)
        frontier, steps = inference.Frontier(task, model.config.eos_id), 0
        for step in model.decode([task]):
            frontier.push(step.positions[0].tolist(), step.tokens[0].tolist())
            steps += 1
        seconds = time.perf_counter() - started
        samples.append(
            {
                "streams": streams,
                "steps": steps,
                "seconds": seconds,
                "tokens_per_second": free / seconds,
                "text": tokenizer.decode(frontier.tokens),
            }
        )
    return samples


def _samples_page(config: RunConfig, samples: list[dict[str, Any]]) -> str:
    how = objectives.training(config.objective).decoding_words
    parts = [
        f"# Samples of {config.name}\n\n{config.model.length} tokens, prompt {config.report.prompt!r}, "
        f"temperature 1, seed {config.seed}. {how}\n"
    ]
    for sample in samples:
        fence = "````"
        parts.append(
            f"\n## S = {sample['streams']}: {sample['steps']} steps, {sample['seconds']:.3f} s, "
            f"{sample['tokens_per_second']:.0f} tokens/s\n\n{fence}text\n{sample['text']}\n{fence}\n"
        )
    return "".join(parts)


def plot(config: RunConfig, metrics: list[dict[str, Any]], summary: dict[str, Any], path: Path) -> None:
    """Training and held-out loss in bits per byte against steps, with the phases marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    training = [record for record in metrics if "bits_per_byte" in record]
    kinds = objectives.training(config.objective).kinds(config)
    heldout = [record for record in metrics if f"heldout_{next(iter(kinds))}_bits_per_byte" in record]
    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=120)
    axes.plot(
        [r["step"] for r in training], [r["bits_per_byte"] for r in training], color="0.7", lw=1, label="training"
    )
    for kind, label in kinds.items():
        key = f"heldout_{kind}_bits_per_byte"
        scored = [record for record in heldout if key in record]
        axes.plot(
            [r["step"] for r in scored],
            [r[key] for r in scored],
            marker="o",
            ms=3,
            lw=1.5,
            label=f"held out, {label}",
        )
    for name, key in (("unigram", "unigram_bits_per_byte"), ("xz", "xz_bits_per_byte")):
        axes.axhline(summary[key], color="0.4", lw=0.8, ls=":")
        axes.annotate(name, (1, summary[key]), xycoords=("axes fraction", "data"), fontsize=8, color="0.3")
    values = [summary["unigram_bits_per_byte"], *(r["bits_per_byte"] for r in training[len(training) // 10 :])]
    low = min([v for r in heldout for k, v in r.items() if k.endswith("bits_per_byte")] + values)
    top = 1.05 * max(values)
    axes.set_ylim(0.95 * low, top)
    _mark_phases(axes, config)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_title(
        f"{config.name}: {summary['parameters'] / 1e6:.2f}M parameters, {summary['tokens'] / 1e6:.2f}M tokens"
    )
    axes.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.93))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _mark_phases(axes: Any, config: RunConfig) -> None:
    spans = objectives.training(config.objective).spans(config)
    for (name, start, stop), colour in zip(spans, ("C0", "C1", "C2"), strict=False):
        if stop > start:
            axes.axvspan(start, stop, color=colour, alpha=0.06)
            axes.annotate(
                name,
                ((start + stop) / 2, 0.96),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=9,
                color=colour,
            )


def lines(summary: dict[str, Any], run: RunDirectory) -> list[str]:
    """Lines that the launcher prints at the end of a run."""
    out = [
        f"{summary['name']}: {summary['parameters']:,} parameters, {summary['steps']} steps, "
        f"{summary['tokens']:,} tokens, {summary['tokens_per_second'] or math.nan:,.0f} tokens/s",
        "",
        f"held-out text: {summary['heldout_bytes']:,} bytes, {summary['heldout_tokens']:,} tokens",
        f"  {'order':<18}{'nats/token':>12}{'perplexity':>12}{'bits/byte':>12}",
    ]
    for score in summary["heldout"]:
        out.append(
            f"  {score['order']:<18}{score['nll']:>12.4f}{score['perplexity']:>12.2f}{score['bits_per_byte']:>12.4f}"
        )
    out.append(f"  {'xz':<18}{'':>24}{summary['xz_bits_per_byte']:>12.4f}")
    out.append(f"  {'unigram':<18}{'':>24}{summary['unigram_bits_per_byte']:>12.4f}")
    best = summary["heldout"][0]["bits_per_byte"]
    for name in ("xz", "unigram"):
        verb = "beats" if best < summary[f"{name}_bits_per_byte"] else "does NOT beat"
        out.append(f"  the model {verb} {name} on this text")
    if drafts := summary.get("drafts"):
        shares = " ".join(f"{value:.2f}" for value in drafts["acceptance"])
        out.append(
            f"  exact, draft {len(drafts['acceptance'])}: accepted {shares}: {drafts['tokens_per_pass']:.2f} a pass"
        )
    out.append("")
    for sample in summary["samples"]:
        out.append(
            f"  S = {sample['streams']}: {sample['steps']} steps, {sample['seconds']:.3f} s, "
            f"{sample['tokens_per_second']:.0f} tokens/s"
        )
    out += ["", summary["sample_text"].strip(), "", f"{run.path}/"]
    for path, content in (
        (run.loss_plot_path, "training and held-out loss"),
        (run.samples_page_path, "generated texts for each number of streams"),
        (run.summary_path, "these figures and the package versions"),
        (run.export, "model directory for armd generate, armd serve and armd eval"),
        (run.config_path, "resolved configuration"),
        (run.metrics_path, "logged steps"),
        (run.checkpoints, "checkpoints to resume from"),
    ):
        name = path.name + "/" * path.is_dir()
        out.append(f"  {name:<15}{content}")
    return out
