"""Draw the processes of a layout and a step of its pipeline, from a real run on this machine with gloo.

python tools/timeline.py --out docs/images [--steps 3] [--config configs/tiny.yaml] [section.field=value ...]

Writes processes.png (who shares what with whom) and timeline.png (forward and backward passes of every pipeline rank,
as they ran). The tokens are random: only the times are of interest.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # processes on gloo, wherever it runs

from armd_scale import config as configs
from armd_scale import config_files
from armd_scale.config import RunConfig
from armd_scale.errors import cli


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of a layout and its pipeline, from a real run")
    parser.add_argument("--config", default="configs/tiny.yaml", help="YAML file of a run")
    parser.add_argument("--out", type=Path, required=True, help="directory for processes.png and timeline.png")
    parser.add_argument("--steps", type=int, default=3, help="steps to run; the last one is drawn")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    args = parser.parse_args()
    config = config_files.load(args.config, args.overrides)
    size = config.model.vocab_size or config.data.vocab_size
    config = configs.with_vocabulary(config, size, config.model.bos_id or 0)
    if config.cluster.gpus_per_node:
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"gpus_per_node": 0})})
    args.out.mkdir(parents=True, exist_ok=True)
    ranks = _run(config, max(1, args.steps))
    _draw_processes(config, ranks, args.out / "processes.png")
    busy = _draw_timeline(config, ranks, args.out / "timeline.png")
    print(f"{args.out}/processes.png, {args.out}/timeline.png: pipeline ranks busy {busy:.0%} of the passes")


def _run(config: RunConfig, steps: int) -> list[dict[str, Any]]:
    """Group numbers and passes of all ranks."""
    import torch.multiprocessing

    count = config.cluster.processes
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_rank, (config, steps, folder), nprocs=count, start_method="spawn")
        return [torch.load(f"{folder}/{rank}") for rank in range(count)]


def _rank(rank: int, config: RunConfig, steps: int, folder: str) -> None:
    import numpy as np
    import torch
    from megatron.core import parallel_state

    from armd_scale import orders
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine
    from armd_scale.rows import arrange

    torch.set_num_threads(1)
    device = torch.device("cpu")
    groups.start(
        config.parallel, rank=rank, processes=config.cluster.processes, rendezvous=f"{folder}/store", device=device
    )
    model = config.model
    assert model.vocab_size is not None
    assert model.bos_id is not None
    engine = Engine(config, device)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (config.train.micro_batch, model.length))
    rows = [arrange(tokens, orders.left_to_right(model.length), model.bos_id)] * config.micro_batches
    for _ in range(steps):
        torch.distributed.barrier()
        with engine.recording() as passes:
            engine.train_step(rows, 0.0)
    place = {
        "tensor": groups.shards().rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "replica": groups.replicas().rank(),
    }
    torch.save({**place, "passes": [tuple(timed) for timed in passes]}, f"{folder}/{rank}")
    groups.stop()


def _draw_processes(config: RunConfig, ranks: list[dict[str, Any]], path: Path) -> None:
    """A box for every rank: a column of boxes for each pipeline stage, a row for each replica."""
    from matplotlib.figure import Figure

    from armd_scale.model.flops import stage_edges

    parallel, edges = config.parallel, stage_edges(config)
    width = parallel.tensor * parallel.pipeline
    figure = Figure(figsize=(1.5 + 1.3 * width, 1.6 + 0.8 * config.replicas), layout="constrained")
    axes = figure.subplots()
    for number, rank in enumerate(ranks):
        left = rank["pipeline"] * (parallel.tensor + 0.4) + rank["tensor"]
        axes.add_patch(_box(left, -rank["replica"], f"C{rank['pipeline'] % 10}"))
        words = f"rank {number}\ntensor {rank['tensor']}"
        axes.text(left + 0.45, 0.3 - rank["replica"], words, ha="center", va="center")
    for stage in range(parallel.pipeline):
        runs = range(stage, len(edges) - 1, parallel.pipeline)
        layers = ", ".join(f"{edges[run]}-{edges[run + 1] - 1}" for run in runs)
        centre = stage * (parallel.tensor + 0.4) + (parallel.tensor - 0.1) / 2
        axes.text(centre, 0.85, f"stage {stage}: layers {layers}", ha="center")
    axes.set_yticks([0.3 - copy for copy in range(config.replicas)])
    of_context = [f", context {part}" for part in range(parallel.context)] if parallel.context > 1 else [""]
    axes.set_yticklabels([f"data {data}{part}" for data in range(config.data_parallel) for part in of_context])
    axes.set_xlim(-0.2, width + 0.4 * parallel.pipeline - 0.2)
    axes.set_ylim(0.8 - config.replicas - 0.1, 1.2)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)


def _box(left: float, bottom: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, bottom), 0.9, 0.6, facecolor=colour, alpha=0.35, edgecolor="black")


def _draw_timeline(config: RunConfig, ranks: list[dict[str, Any]], path: Path) -> float:
    """A row for each pipeline rank (tensor and data rank 0); returns the share of the time in which they compute."""
    from matplotlib.figure import Figure

    from armd_scale.planning.schedule import operations

    parallel = config.parallel
    chosen = [rank for rank in ranks if rank["tensor"] == rank["replica"] == 0]
    chosen.sort(key=lambda rank: rank["pipeline"])
    first = min(rank["passes"][0][1] for rank in chosen)
    last = max(rank["passes"][-1][2] for rank in chosen)
    figure = Figure(figsize=(11, 0.9 + 0.55 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    busy = 0.0
    for rank in chosen:
        plan = operations(rank["pipeline"], parallel.pipeline, parallel.chunks, config.micro_batches)
        for operation, (backward, start, stop) in zip(plan, rank["passes"], strict=True):
            busy += stop - start
            left, width = 1e3 * (start - first), 1e3 * (stop - start)
            colour = ("#8fbc5a" if backward else "#5b8fd6", "#4e7a25" if backward else "#274f8a")[operation.chunk % 2]
            axes.barh(-rank["pipeline"], width, left=left, height=0.8, color=colour, edgecolor="white", linewidth=0.5)
            if width > 0.012 * 1e3 * (last - first):
                axes.text(
                    left + width / 2, -rank["pipeline"], operation.micro_batch, ha="center", va="center",
                    color="white", fontsize=7,
                )  # fmt: skip
    axes.set_yticks([-rank["pipeline"] for rank in chosen])
    axes.set_yticklabels([f"stage {rank['pipeline']}" for rank in chosen])
    axes.set_xlabel("ms; forward blue, backward green" + ("; second run of layers darker" * (parallel.chunks > 1)))
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return busy / ((last - first) * len(chosen))


if __name__ == "__main__":
    cli(main)
