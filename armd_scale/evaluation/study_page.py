"""The report page of a study: ``README.md`` and its pictures, from ``results.json`` alone."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from armd_scale.evaluation.study import MAIN, OBJECTIVES
from armd_scale.evaluation.suites import PUBLISHED
from armd_scale.files import write_atomically
from armd_scale.traits import TRAITS

_EQUAL = 0.03
"""Largest relative excess of ARMD's left-to-right perplexity over AR's that counts as equal."""
_PAPER_COST = 0.08
"""Relative cost of S = 4 in judge perplexity after strided fine-tuning in the paper."""


class Mean(NamedTuple):
    """A mean over seeds with its standard error, NaN with one seed."""

    value: float
    se: float

    def text(self, digits: int = 2, sign: str = "") -> str:
        spread = "" if math.isnan(self.se) else f" ± {self.se:.{digits}f}"
        return f"{self.value:{sign}.{digits}f}{spread}"

    def percent(self, digits: int = 1) -> str:
        """The logarithm of a ratio as a change in percent."""
        return Mean(100 * math.expm1(self.value), 100 * math.exp(self.value) * self.se).text(digits, "+") + " %"


def mean(values: list[float]) -> Mean:
    """Mean and standard error over seeds."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Mean(float(np.mean(values)), error)


class Figures:
    """Reads figures from the results of a study."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        self.runs: dict[str, dict[str, Any]] = results["runs"]
        self.equal = int(results["equal_steps"])

    def first(self, variant: str) -> dict[str, Any]:
        """The run of the first seed."""
        return next(iter(self.runs[variant].values()))

    def checkpoint(self, variant: str, seed: str, step: int) -> dict[str, Any]:
        return self.runs[variant][seed]["checkpoints"][str(step)]

    def nll(self, variant: str, order: str, step: int | None = None) -> dict[str, float]:
        """Held-out nats per token by seed."""
        step = step or self.equal
        return {s: self.checkpoint(variant, s, step)["heldout"][order]["nll"] for s in self.runs[variant]}

    def difference(self, variant: str, other: str, order: str, step: int | None = None) -> Mean:
        """Mean difference in nats per token over the common seeds."""
        nll, base = self.nll(variant, order, step), self.nll(other, order, step)
        return mean([nll[seed] - base[seed] for seed in nll if seed in base])

    def perplexity(self, nll: dict[str, float]) -> Mean:
        return mean([math.exp(value) for value in nll.values()])

    def texts(self, variant: str, step: int, streams: int, field: str = "perplexity") -> dict[str, float]:
        """A figure of the generated texts by seed."""
        out = {}
        for seed in self.runs[variant]:
            rows = self.checkpoint(variant, seed, step)["texts"]
            out[seed] = next(row[field] for row in rows if row["tokens_a_step"] == streams)
        return out

    def cost(self, variant: str, step: int, streams: int) -> Mean:
        """Mean over seeds of the log ratio of judge perplexities: ``streams`` tokens per step over a token per step."""
        serial, parallel = self.texts(variant, step, 1), self.texts(variant, step, streams)
        return mean([math.log(parallel[seed] / serial[seed]) for seed in serial])

    def steps(self, variant: str) -> list[int]:
        """Measured steps of a variant."""
        return sorted(map(int, self.first(variant)["checkpoints"]))


def write(page: Path, results: dict[str, Any]) -> None:
    """Write ``README.md`` and the pictures into ``page``."""
    figures = Figures(results)
    _plot_loss(figures, page / "loss.png")
    _plot_quality(figures, page / "quality.png")
    _plot_ablations(figures, page / "ablations.png")
    parts = [_head(figures), _likelihood(figures), _diffusion(figures), _parallel(figures), _ablations(figures)]
    parts += [_suite(figures), _runs(figures)]
    write_atomically(page / "README.md", "\n".join(part for part in parts if part))


def _head(f: Figures) -> str:
    r, first = f.results, f.first("armd")
    where = r["environment"]
    machine = f"Python {where['python']}, PyTorch {where['packages']['torch']}, {where['cores']} cores"
    return f"""# Study: {r["name"]}

Made by `{r["command"]}` at commit `{r["commit"][:12]}`
({machine}{f", {where['gpu']}" if where.get("gpu") else ""}); {r["minutes"]:.0f} minutes in the last session of it.
All figures are in [results.json](results.json); the study file is in it.

{first["parameters"]:,} parameters, {f.equal:,} steps of {first["tokens_per_step"]:,} tokens, the same samples in the
same order for every run of a seed. ± is the standard error over the seeds of a variant (last table). Held-out figures
are nats per token or perplexities of {next(iter(_heldout(f, "armd").values()))["tokens"]:,} tokens.
"""


def _heldout(f: Figures, variant: str) -> dict[str, Any]:
    return f.checkpoint(variant, next(iter(f.runs[variant])), f.equal)["heldout"]


def _likelihood(f: Figures) -> str:
    ratio = f.difference("armd", "ar", "left-to-right")
    holds = math.expm1(ratio.value) <= _EQUAL
    rows = []
    for variant in OBJECTIVES:
        for order in _heldout(f, variant):
            value = f.nll(variant, order)
            rows.append(f"| {TRAITS[variant].label} | {order} | {mean(list(value.values())).text(4)} | ")
            rows[-1] += f"{f.perplexity(value).text()} | {_bits(f, variant, order).text(4)} |"
    return f"""
## Is ARMD's left-to-right perplexity within {_EQUAL:.0%} of AR's at equal steps?

**{"Yes" if holds else "No"}: {ratio.percent()}.**

| objective | order | nats per token | perplexity | bits per byte |
|---|---|---|---|---|
{chr(10).join(rows)}

`shuffled:K` is the mean over random shuffles of K tokens, `strided:S` the order of S streams, `bound` an upper bound.

![held-out loss against steps and FLOPs](loss.png)
"""


def _bits(f: Figures, variant: str, order: str) -> Mean:
    return mean([f.checkpoint(variant, s, f.equal)["heldout"][order]["bits_per_byte"] for s in f.runs[variant]])


def _diffusion(f: Figures) -> str:
    """The steps that masked diffusion needs for ARMD's perplexity, or else the steps that ARMD needs for its bound."""
    last = f.steps("mdm")[-1]
    goal = mean(list(f.nll("armd", "left-to-right").values())).value
    bound = mean(list(f.nll("mdm", "bound", last).values()))
    # Curves are compared with curves, as their validation samples differ from those of the final scores.
    goals = {seed: dict(run["curve"])[f.equal] for seed, run in f.runs["armd"].items()}
    reached = [steps_to(f.runs["mdm"][seed]["curve"], goals[seed]) for seed in f.runs["mdm"]]
    known = [step for step in reached if step is not None]
    if len(known) == len(reached):
        times = mean([step / f.equal for step in known])
        answer = f"**{times.text(1)} times ARMD's steps** (the paper: about 3)."
    else:
        ends = {seed: run["curve"][-1][1] for seed, run in f.runs["mdm"].items()}
        back = [steps_to(f.runs["armd"][seed]["curve"], ends[seed]) for seed in f.runs["mdm"]]
        ratio = mean([last / step for step in back if step is not None])
        answer = (
            f"**More than {last / f.equal:g} times**: after {last:,} steps the bound is {bound.text(3)} nats, "
            f"{math.expm1(bound.value - goal):+.1%} in perplexity. ARMD passed that bound in {ratio.text(1)} times "
            "fewer steps. The paper says that about 3 times as many steps reach it, of models trained for hundreds of "
            "thousands of steps."
        )
    return f"""
## How many steps does masked diffusion need for ARMD's perplexity?

{answer}

MDM's perplexity is exp(bound); ARMD's is exact, left to right.
"""


def steps_to(curve: list[list[float]], goal: float) -> float | None:
    """Step at which a held-out curve first reaches ``goal``, by linear interpolation; None if it never does."""
    before: list[float] | None = None
    for step, value in curve:
        if value <= goal:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - goal) / (before[1] - value)
        before = [step, value]
    return None


def _parallel(f: Figures) -> str:
    streams = [s for s in f.results["study"]["streams"] if s > 1]
    rows, steps = [], [step for step in f.steps("armd") if step >= f.equal]
    for step in steps:
        name = "before" if step == f.equal else f"after {step - f.equal:,} steps"
        serial = mean(list(f.texts("armd", step, 1).values()))
        costs = " | ".join(f.cost("armd", step, s).percent() for s in streams)
        nats = mean(list(f.nll("armd", "left-to-right", step).values()))
        rows.append(f"| ARMD, {name} | {serial.text(1)} | {costs} | {nats.text(3)} |")
    last = f.steps("mdm")[-1]
    serial = mean(list(f.texts("mdm", last, 1).values()))
    costs = " | ".join(f.cost("mdm", last, s).percent() for s in streams)
    rows.append(f"| MDM, {last:,} steps of training | {serial.text(1)} | {costs} | |")
    ar = mean(list(f.texts("ar", f.equal, 1).values()))
    rows.append(f"| AR | {ar.text(1)} |{' |' * len(streams)} |")
    four = f.cost("armd", steps[-1], 4) if 4 in streams else None
    answer = f"**S = 4 costs {four.percent()} after {steps[-1] - f.equal:,} steps** (the paper: +8 %)." if four else ""
    entropies = [
        f"| ARMD, S = {s} | {mean(list(f.texts('armd', steps[-1], s, 'entropy').values())).text(3)} | "
        f"{mean(list(f.texts('armd', steps[-1], s, 'entropy_bits').values())).text(3)} | "
        f"{mean(list(f.texts('armd', steps[-1], s, 'distinct_2').values())).text(3)} | {_alike(f, steps[-1], s)} |"
        for s in f.results["study"]["streams"]
    ]
    return f"""
## What do S tokens a step cost, before and after strided fine-tuning?

{answer}

Perplexity of {f.results["study"]["texts"]} texts under the judge, a wider left-to-right model trained here for longer,
and its change at S tokens a step (for MDM: N / S steps). The last column is what fine-tuning does to the exact
left-to-right likelihood.

| model | S = 1 | {" | ".join(f"S = {s}" for s in streams)} | nats, left to right |
|---|---|{"---|" * len(streams)}---|
{chr(10).join(rows)}

| after fine-tuning | entropy of a text, nats | bits | distinct-2 | self-BLEU |
|---|---|---|---|---|
{chr(10).join(entropies)}

![quality against speed](quality.png)
"""


def _alike(f: Figures, step: int, streams: int) -> str:
    values = list(f.texts("armd", step, streams, "self_bleu").values())
    return "" if None in values else mean(values).text(2)


def _questions(f: Figures) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name, variant in f.results["study"]["variants"].items():
        if variant["question"] and name in f.runs:
            out.setdefault(variant["question"], []).append(name)
    return out


def _ablations(f: Figures) -> str:
    """Tables of differences to the base variant, a table for each question."""
    parts = ["\n## What each decision does\n"]
    parts.append(
        "Change in nats per token at equal steps beside the variant in the head of the table, the same seeds (negative "
        "is better), and the cost of a token in FLOPs.\n"
    )
    for question, names in _questions(f).items():
        base = _base(f, names[0])
        orders = _orders(f, names[0])
        label = TRAITS[base].label if base in TRAITS else base
        head = f"| beside {label} | {' | '.join(orders)} | FLOPs |\n|---|{'---|' * len(orders)}---|"
        parts.append(f"### {question}\n\n{head}")
        for name in names:
            cells = " | ".join(f.difference(name, base, order).text(4, "+") for order in orders)
            share = f.first(name)["flops_per_token"] / f.first(base)["flops_per_token"]
            parts.append(f"| {name} | {cells} | {share:.2f} |")
        parts.append("")
    parts.append("![ablations](ablations.png)\n")
    return "\n".join(parts) if len(parts) > 3 else ""


def _base(f: Figures, name: str) -> str:
    """The base variant of an ablation."""
    return str(f.results["study"]["variants"][name]["beside"])


def _orders(f: Figures, name: str) -> list[str]:
    """Orders under which both an ablation and its base are scored."""
    scored = _heldout(f, name)
    return [order for order in _heldout(f, _base(f, name)) if order in scored]


def _suite(f: Figures) -> str:
    texts = list(f.checkpoint("armd", next(iter(f.runs["armd"])), f.equal).get("suite", {}))
    if not texts:
        return ""
    rows = []
    for variant in OBJECTIVES:
        cells = []
        for text in texts:
            values = [f.checkpoint(variant, s, f.equal)["suite"][text]["perplexity"] for s in f.runs[variant]]
            cells.append(mean(values).text(1))
        rows.append(f"| {_label(variant)} | {' | '.join(cells)} |")
    for name, published in PUBLISHED.items():
        cells = [f"{published[text]:.2f}" if text in published else "" for text in texts]
        rows.append(f"| paper, {name} | {' | '.join(cells)} |")
    limit = f.results["study"]["suite_chunks"]
    return f"""
## Zero-shot perplexity

{f"The first {limit} chunks of each text. " if limit else ""}Tokens are those of the study's own tokenizer and chunks
are short: the paper's rows (GPT-2 tokens, chunks of 1,024) stand for the form of the table, not for comparison.

| | {" | ".join(texts)} |
|---|{"---|" * len(texts)}
{chr(10).join(rows)}
"""


def _runs(f: Figures) -> str:
    rows = []
    for variant, seeds in f.runs.items():
        first = f.first(variant)
        rate = mean([run["tokens_per_second"] for run in seeds.values()])
        flops = first["flops_per_token"] / f.first("ar")["flops_per_token"]
        cells = (variant, len(seeds), f"{first['steps']:,}", f"{first['parameters']:,}", f"{flops:.2f}")
        rows.append(f"| {' | '.join(map(str, cells))} | {rate.value:,.0f} |")
    return f"""
## The runs

| variant | seeds | steps | parameters | FLOPs of a token, AR = 1 | tokens/s |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Tokens per second are those of runs side by side on one machine; `tools/bench.py` measures speed.
"""


def _plot_loss(f: Figures, path: Path) -> None:
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), dpi=120, sharey=True)
    for variant in OBJECTIVES:
        for seed, run in f.runs[variant].items():
            steps, values = (np.array(column) for column in zip(*run["curve"], strict=True))
            label = _label(variant) if seed == next(iter(f.runs[variant])) else None
            flops = steps * run["tokens_per_step"] * run["flops_per_token"]
            for axes, x in zip(panels, (steps, flops), strict=True):
                axes.plot(x, values, color=f"C{OBJECTIVES.index(variant)}", lw=1.2, alpha=0.8, label=label)
    panels[0].axvline(f.equal, color="0.6", lw=0.8, ls=":")
    panels[0].set_xlabel("steps")
    panels[1].set_xlabel("training FLOPs")
    panels[0].set_ylabel("held-out nats per token")
    for axes in panels:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.grid(alpha=0.2)
    panels[0].legend(fontsize=9)
    _save(figure, path)


def _label(variant: str) -> str:
    return TRAITS[variant].label + ("" if TRAITS[variant].exact else " (bound)")


def _plot_quality(f: Figures, path: Path) -> None:
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), dpi=120)
    armd, mdm = f.steps("armd"), f.steps("mdm")
    lines = [
        ("ar", f.equal, "AR", "C0", "s"),
        ("armd", f.equal, "ARMD, before strided fine-tuning", "C1", "o--"),
        ("armd", armd[-1], "ARMD, after it", "C1", "o-"),
        ("mdm", mdm[-1], f"MDM, {mdm[-1]:,} steps of training", "C2", "o-"),
    ]
    for variant, step, label, colour, style in lines:
        streams = f.results["study"]["streams"] if TRAITS[variant].settings else [1]
        for axes, field in zip(panels, ("perplexity", "entropy"), strict=True):
            means = [mean(list(f.texts(variant, step, s, field).values())) for s in streams]
            axes.errorbar(
                streams, [m.value for m in means], yerr=[m.se for m in means], fmt=style, color=colour, ms=4, lw=1.2,
                capsize=2, label=label,
            )  # fmt: skip
    for axes, title in zip(panels, ("judge perplexity", "entropy of a text, nats"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens a step (MDM: on average)")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.2)
    panels[0].set_yscale("log")
    panels[0].legend(fontsize=8)
    _save(figure, path)


def _plot_ablations(f: Figures, path: Path) -> None:
    names = [name for group in _questions(f).values() for name in group if _base(f, name) == MAIN]
    if not names:
        return
    pyplot = _pyplot()
    orders = _orders(f, names[0])
    figure, panels = pyplot.subplots(
        1, len(orders), figsize=(4 * len(orders), 0.32 * len(names) + 1.2), dpi=120, sharey=True
    )
    for axes, order in zip(np.atleast_1d(panels), orders, strict=True):
        means = [f.difference(name, "armd", order) for name in names]
        axes.barh(names, [m.value for m in means], xerr=[m.se for m in means], color="C1", alpha=0.7, ecolor="0.3")
        axes.axvline(0, color="0.3", lw=0.8)
        axes.set_title(order, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.set_xscale("symlog", linthresh=0.05)
        axes.set_xticks([-0.1, 0, 0.1, 1], ["-0.1", "0", "0.1", "1"])
    np.atleast_1d(panels)[0].invert_yaxis()
    figure.supxlabel("change in nats per token beside the study's ARMD", fontsize=9)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    _pyplot().close(figure)
