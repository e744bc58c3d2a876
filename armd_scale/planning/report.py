"""Text reports and plots of plans."""

from pathlib import Path
from typing import Any

from armd_scale.planning.hardware import ARITHMETIC, COMMUNICATION, MEMORY, RESERVED
from armd_scale.planning.plan import Plan


def derived(plan: Plan) -> dict[str, Any]:
    """Figures of a step and of the whole run."""
    config = plan.config
    seconds = plan.step * config.total_steps
    facts: dict[str, Any] = {"fits": plan.fits, "peak_bytes": plan.peak.total}
    if plan.gpu.cuda:
        facts |= {
            "step_seconds": plan.step,
            "tokens_per_second": plan.tokens_per_second,
            "mfu": plan.mfu,
            "days": seconds / 86400,
            "gpu_hours": seconds / 3600 * config.cluster.processes,
        }
    return facts


def layout(plan: Plan) -> str:
    """The layout in a line."""
    config = plan.config
    parallel = config.parallel
    words = [parallel.describe(), f"data {config.data_parallel} (ZeRO-{parallel.zero})"]
    recompute = "" if parallel.recompute == "none" else f", recompute {parallel.recompute}"
    return f"{' x '.join(words)}, micro-batch {config.train.micro_batch}{recompute}"


def table(plan: Plan, recomputed: dict[str, Plan], assumed_vocabulary: bool) -> str:
    """The full report of a plan; ``recomputed``: plans of the same layout by kind of recomputation."""
    config, gpu = plan.config, plan.gpu
    tokens = config.train.global_batch * config.model.length
    unit, name = (1e9, "GB") if plan.peak.total >= 1e9 else (1e6, "MB")
    device = "GPU" if gpu.cuda else "process"
    nodes = f"{config.cluster.nodes} node" + "s" * (config.cluster.nodes > 1)
    lines = [
        f"{config.name}: {plan.parameters:,.0f} parameters, {plan.flops_per_token:.3g} FLOPs per token in training",
        f"  {config.cluster.processes} x {gpu.name} on {nodes}: {layout(plan)}",
        f"  a step: {config.train.global_batch:,} sequences = {tokens:,} tokens, "
        f"{config.micro_batches} micro-batches per rank",
        "",
        "  stage  layers   share of the passes",
    ]
    for stage, (first, last) in enumerate(zip(plan.edges, plan.edges[1:], strict=False)):
        lines.append(f"  {stage % config.parallel.pipeline:>5}  {f'{first}-{last - 1}':<7}  {plan.costs[stage]:7.1%}")
    kinds = ("weights", "gradients", "optimizer", "activations", "buffers")
    lines += [
        "",
        f"  peak memory of a {device}, {name}",
        "  stage  " + "".join(f"{k:>13}" for k in kinds),
    ]
    lines[-1] += f"{'total':>10}"
    for rank, memory in enumerate(plan.memory):
        row = "".join(f"{getattr(memory, kind) / unit:13.2f}" for kind in kinds)
        lines.append(f"  {rank:>5}  {row}{memory.total / unit:10.2f}")
    lines += ["", "  activations and total by recomputation"]
    for kind, other in recomputed.items():
        most = max(memory.activations for memory in other.memory)
        time = f", a step of {other.step:.2f} s" if gpu.cuda else ""
        lines.append(f"  recompute {kind + ':':<10} {most / unit:8.2f}{other.peak.total / unit:10.2f}{time}")
    if not gpu.cuda:
        return "\n".join(lines)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    available = (gpu.memory - RESERVED) / 1e9
    lines += ["", f"  {verdict}: {plan.peak.total / 1e9:.1f} of {available:.1f} GB", ""]
    lines.append(
        "  sent by the busiest GPU in a step: "
        + ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in plan.traffic.items() if v)
    )
    lines.append(f"  pipeline bubble {plan.bubble:.1%}" if config.parallel.pipeline > 1 else "  no pipeline bubble")
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in plan.seconds.items())
    facts = derived(plan)
    lines += [
        f"  a step takes about {plan.step:.2f} s ({parts})",
        *_work(plan),
        f"  {facts['tokens_per_second']:,.0f} tokens/s, {facts['mfu']:.0%} MFU; {config.total_steps:,} steps = "
        f"{config.total_steps * tokens / 1e9:,.1f}e9 tokens: {facts['days']:.1f} days, "
        f"{facts['gpu_hours']:,.0f} GPU-hours",
        "",
        f"  assumed, not measured: matrix products reach {ARITHMETIC:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s, other "
        f"kernels {MEMORY:.0%} of the memory bandwidth,",
        f"  collectives {COMMUNICATION:.0%} of {gpu.link / 1e9:.0f} GB/s in a node and {gpu.network / 1e9:.0f} GB/s "
        f"between nodes and GPU; no overlap with computation;",
        f"  {RESERVED / 1e9:.0f} GB of a GPU are reserved for CUDA, NCCL and fragmentation; one token per block; "
        "evaluation and checkpoints take no time",
    ]
    if config.train.fp8:
        lines.append("  FP8 is planned as bfloat16")
    if assumed_vocabulary:
        lines.append(f"  the vocabulary is unknown before the data is prepared: {config.model.vocab_size:,} assumed")
    return "\n".join(lines)


def _work(plan: Plan) -> list[str]:
    """Time of the passes of a micro-batch by kind of work, and the lower bounds at the GPU's peaks."""
    work, gpu = plan.work, plan.gpu
    rest = work.seconds - work.products - work.attention - work.regions
    kinds = {
        "matrix products": work.products,
        "attention": work.attention,
        "fused element-wise regions": work.regions,
        "other": rest,
    }
    parts = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in kinds.items())
    floors = f"{1e3 * work.flops / gpu.flops:.1f} and {1e3 * work.moved / gpu.bandwidth:.1f} ms"
    return [
        f"  a micro-batch takes {1e3 * work.seconds:.1f} ms on the busiest stage:",
        f"  {parts} ms;",
        f"  its {work.flops / 1e12:.3g} TFLOP and {work.moved / 1e9:.3g} GB moved take {floors} at the peaks",
    ]


def comparison(plan: Plan, others: list[Plan]) -> str:
    """Table of the fastest layouts; ``others`` is sorted by step time."""
    if not others:
        return "\n  no layout of this run fits on these GPUs"
    lines = ["", "  step, s    MFU       GB   fastest layouts that fit"]
    for other in others:
        lines.append(f"  {other.step:8.2f} {other.mfu:6.1%} {other.peak.total / 1e9:8.1f}   {layout(other)}")
    faster = plan.step / others[0].step - 1
    if plan.fits and faster > 0.02:
        lines.append(f"  the first layout is {faster:.0%} faster than the configured layout")
    return "\n".join(lines)


def draw_growth(rows: list[dict[str, Any]], along: str, path: Path) -> None:
    """Plot time and memory along one size; rows have kind, place, seconds, batch, length, ratio, memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), dpi=120)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        group = [row for row in rows if row["kind"] == kind]
        sizes = [row["place"] for row in group]
        micro = [1e6 * row["seconds"] / row["batch"] / row["length"] for row in group]
        drawn = micro, [row["ratio"] for row in group], [row["memory"] / 1e9 for row in group]
        for axes, values in zip(panels, drawn, strict=True):
            axes.plot(sizes, values, "o-", ms=4, lw=1.2, label=kind)
    for axes, title in zip(panels, ("microseconds per token", "step time over AR", "memory, GB"), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(along)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.2)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
