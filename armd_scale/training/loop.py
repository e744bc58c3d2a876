"""The training loop of one rank.

``train`` joins the processes of a run, resumes from its newest checkpoint, and steps through the phases.
Everything that a step does follows from its number: samples, orders, learning rate. So a resumed run does what
the uninterrupted one would.
"""

import concurrent.futures
import itertools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armd_scale import orders
from armd_scale.config import RunConfig, identity, with_vocabulary
from armd_scale.errors import UserError
from armd_scale.model.flops import peak_flops, run_costs, run_edges, training_flops_per_token
from armd_scale.model.rows import Rows, arrange
from armd_scale.orders import Layout
from armd_scale.parallel import groups
from armd_scale.parallel.engine import Engine
from armd_scale.training import checkpoint, manifest, schedules
from armd_scale.training.samples import Samples
from armd_scale.training.telemetry import Telemetry
from data_pipeline.shards import PackedDataset

_LN2 = float(np.log(2))


def train(config: RunConfig, rank: int, processes: int, local_rank: int, rendezvous: str | Path) -> None:
    """Train a run to its end as one of ``processes`` processes. Raises ``UserError`` on every rank alike."""
    if processes != config.cluster.processes:
        raise UserError(
            f"the run is laid out for {config.cluster.processes} processes (cluster.nodes x cluster.tasks_per_node) "
            f"but {processes} were started"
        )
    device = torch.device("cuda", local_rank) if config.cluster.gpus_per_node else torch.device("cpu")
    if device.type == "cuda":
        if config.parallel.tensor > 1:
            # One queue keeps the order in which Megatron hides tensor-parallel messages behind matrix products.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device)
        # A bfloat16 run has few float32 products (prefix aggregation): the matrix units take them as TF32.
        torch.set_float32_matmul_precision("high" if config.train.dtype == "bfloat16" else "highest")
    else:
        torch.set_num_threads(config.cluster.cpus_per_task)
    samples = Samples(config)
    heldout = PackedDataset(config.data_directory / "heldout")
    index = samples.datasets[0].index
    config = with_vocabulary(config, index["vocab_size"], index["bos_id"])
    groups.start(config.parallel, rank=rank, processes=processes, rendezvous=rendezvous, device=device)
    try:
        _Trainer(config, samples, heldout, device, rank).run()
    finally:
        groups.stop()


class _Trainer:
    def __init__(
        self, config: RunConfig, samples: Samples, heldout: PackedDataset, device: torch.device, rank: int
    ) -> None:
        self.config = config
        self.samples = samples
        self.heldout = heldout
        self.engine = Engine(config, device)
        self.folder = config.directory / "checkpoints"
        self.step = 0
        if rank == 0:
            print(_layout(config), flush=True)
        self.checkpointer = checkpoint.Checkpointer(
            self.engine, self.folder, config.train.keep_checkpoints, config.train.keep_every
        )
        found, state = checkpoint.newest(self.folder), {}
        if found:
            manifest.check_identity(found, config)
            facts = checkpoint.load(self.engine, found)
            self.step, state = facts["step"], facts["state"]
        lines = self.samples.start(self.step, state)
        for line in [f"resumed from {found}"] * bool(found) + lines if rank == 0 else []:
            print(line, flush=True)
        self.telemetry = Telemetry(config, active=rank == 0, first_step=self.step)
        self.flops = training_flops_per_token(config.model) * config.train.global_batch * config.model.length
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = peak * config.cluster.processes if peak else None

    def run(self) -> None:
        """All steps that are left, with their evaluations and checkpoints."""
        try:
            self._run()
        except UserError:  # on all ranks alike: what is being written can still be finished
            self.checkpointer.close()
            raise

    def _run(self) -> None:
        total, train = self.config.total_steps, self.config.train
        marked = time.perf_counter()
        losses: list[torch.Tensor] = []
        with concurrent.futures.ThreadPoolExecutor(1) as loader:
            batch = loader.submit(self.batch, self.step)
            while self.step < total:
                micro_batches = batch.result()
                batch = loader.submit(self.batch, min(self.step + 1, total - 1))
                rate = schedules.learning_rate(self.step, self.config.optimizer, total)
                losses.append(self.engine.train_step(micro_batches, rate))
                done, self.step = self.step, self.step + 1
                last_of_phase = self.step in (train.steps, total)
                saving = self.step % train.checkpoint_every == 0 or last_of_phase
                # Every checkpoint ends a record, so that a resumed run logs the same means.
                if self.step % train.log_every == 0 or saving:
                    loss = self.engine.mean(torch.stack(losses).mean())
                    if not math.isfinite(loss):
                        raise UserError(
                            f"the loss is not finite after step {self.step}: lower optimizer.lr or lengthen the "
                            f"warm-up, and go on from the newest checkpoint in {self.folder}"
                        )
                    now = time.perf_counter()
                    self.telemetry.write(self._record(done, loss, rate, (now - marked) / len(losses)))
                    losses, marked = [], now
                paused = time.perf_counter()
                if self.step % train.eval_every == 0 or last_of_phase:
                    self.telemetry.write({"step": self.step, **self.evaluate()})
                if saving:
                    self.save()
                marked += time.perf_counter() - paused  # the time of a step is that of training alone
        self.checkpointer.close()
        self.telemetry.close()

    def batch(self, step: int) -> list[Rows]:
        """This rank's micro-batches of a step."""
        train, config = self.config.train, self.config
        share = train.global_batch // config.data_parallel
        first = self.engine.data_rank * share
        tokens = self.samples.read(step * train.global_batch + first, share)
        layouts = [schedules.layout(step, first + slot, config) for slot in range(share)]
        return self._arrange(tokens, layouts)

    def evaluate(self) -> dict[str, Any]:
        """Held-out loss in nats and bits per byte under the three kinds of order, with the averaged weights."""
        config = self.config
        length, ranks = config.model.length, config.data_parallel
        # Spread over the split: neighbours come from one document.
        count = min(len(self.heldout), config.train.eval_samples)
        numbers = (np.arange(count) * len(self.heldout) // count)[self.engine.data_rank :: ranks]
        tokens = self.heldout.read(numbers)
        kinds = {
            "left_to_right": [orders.left_to_right(length)] * len(numbers),
            "permutation": [orders.shuffled(length, config.orders.rho, 0, int(n)) for n in numbers],
            "strided": [orders.strided(length, config.train.eval_streams)] * len(numbers),
        }
        record: dict[str, Any] = {}
        with self.engine.averaged_weights():
            for kind, layouts in kinds.items():
                total, count = self.engine.evaluate(self._arrange(tokens, layouts))
                record[f"heldout_{kind}"] = total / count
                record[f"heldout_{kind}_bits_per_byte"] = total / count / _LN2 / self.heldout.bytes_per_token
        return record

    def save(self) -> None:
        """Start writing a checkpoint of the present step."""
        state = {
            "identity": identity(self.config),
            "samples": self.step * self.config.train.global_batch,
            **self.samples.state(),
        }
        self.checkpointer.save(self.step, state)

    def _arrange(self, tokens: np.ndarray, layouts: Sequence[Layout]) -> list[Rows]:
        bos = self.config.model.bos_id
        assert bos is not None
        size = self.config.train.micro_batch
        parts = [slice(start, start + size) for start in range(0, len(tokens), size)]
        stacked = [Layout(*(np.stack(field) for field in zip(*layouts[part], strict=True))) for part in parts]
        return [arrange(tokens[part], layout, bos) for part, layout in zip(parts, stacked, strict=True)]

    def _record(self, done: int, loss: float, rate: float, seconds: float) -> dict[str, Any]:
        config = self.config
        record: dict[str, Any] = {
            "step": self.step,
            "loss": loss,
            "bits_per_byte": loss / _LN2 / self.samples.bytes_per_token,
            "learning_rate": rate,
            "grad_norm": self.engine.grad_norm,
            "phase": schedules.phase(done, config),
            "shuffled": schedules.shuffled_tokens(done, config),
            "streams": schedules.streams(done, config),
            "tokens": self.step * config.train.global_batch * config.model.length,
            "seconds_per_step": seconds,
            "tokens_per_second": config.train.global_batch * config.model.length / seconds,
        }
        if self.peak:
            record["mfu"] = self.flops / seconds / self.peak
        return record


def _layout(config: RunConfig) -> str:
    """The layout of the processes, and the cut of the layers when there is one."""
    parallel = config.parallel
    text = f"{config.cluster.processes} processes: {parallel.describe()} x data {config.data_parallel}"
    text += f" (ZeRO-{parallel.zero})"
    if parallel.pipeline == 1:
        return text
    runs = zip(itertools.pairwise(run_edges(config)), run_costs(config), strict=True)
    parts = [
        f"stage {run % parallel.pipeline}: layers {first}-{last - 1} ({cost:.0%})"
        for run, ((first, last), cost) in enumerate(runs)
    ]
    return f"{text}; cut{' by FLOPs' if parallel.cut is None else ''}: {', '.join(parts)}"
