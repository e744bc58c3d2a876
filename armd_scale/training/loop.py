"""The training loop of one rank.

``train`` joins the processes of a run, resumes from the newest checkpoint, and trains the remaining steps. The samples,
orders and learning rate of a step depend on the step number alone, so a resumed run computes the same steps as an
uninterrupted run.
"""

import concurrent.futures
import itertools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from armd_scale import logs
from armd_scale.config import RunConfig, identity, with_vocabulary
from armd_scale.data.shards import LOSS, PackedDataset
from armd_scale.errors import UserError
from armd_scale.logs import TRAIN as log
from armd_scale.model.flops import peak_flops, stage_costs, stage_edges, training_flops_per_token
from armd_scale.objectives import interface as objectives
from armd_scale.parallel import groups
from armd_scale.parallel.engine import Engine, Pending
from armd_scale.rows import Rows, look_ahead, only
from armd_scale.training import checkpoint, kernels, manifest, profiling, schedules
from armd_scale.training.health import REQUEUE, STOP, Heartbeat, Signals, Spikes, Watchdog, slow_ranks
from armd_scale.training.samples import Samples
from armd_scale.training.telemetry import Lines, Telemetry

_LN2 = float(np.log(2))


def train(config: RunConfig, rank: int, processes: int, local_rank: int, rendezvous: str | Path) -> int:
    """Train a run to its last step as one of ``processes`` processes. Raises ``UserError`` on all ranks.

    Returns 0, or ``health.REQUEUE`` or ``health.STOP`` after a signal and a final checkpoint.
    """
    logs.configure(rank)
    if processes != config.cluster.processes:
        raise UserError(
            f"cluster.nodes x cluster.tasks_per_node is {config.cluster.processes} processes but {processes} were "
            "started: start as many processes, or change the cluster section"
        )
    device = torch.device("cuda", local_rank) if config.cluster.gpus_per_node else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"cluster.gpus_per_node is {config.cluster.gpus_per_node} but process {local_rank} of this machine "
                f"sees {torch.cuda.device_count()} GPUs: lower cluster.gpus_per_node, cluster.tasks_per_node "
                "and the layout"
            )
        if config.parallel.tensor > 1:
            # A single queue keeps the order in which Megatron overlaps tensor-parallel messages with matrix products.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device)
        # The few float32 products of a bfloat16 run (prefix aggregation) use TF32.
        torch.set_float32_matmul_precision("high" if config.train.dtype == "bfloat16" else "highest")
    else:
        torch.set_num_threads(config.cluster.cpus_per_task)
    samples = Samples(config)
    heldout = PackedDataset(config.data_directory / "heldout")
    index = samples.datasets[0].index
    config = with_vocabulary(config, index["vocab_size"], index["bos_id"])
    groups.start(config.parallel, rank=rank, processes=processes, rendezvous=rendezvous, device=device)
    try:
        return _Trainer(config, samples, heldout, device, rank).run()
    finally:
        groups.stop()


class _Texts(NamedTuple):
    """Samples with their documents (``packing.starts``) and the tokens that count, [B, N] each; None: not needed."""

    tokens: np.ndarray
    starts: np.ndarray | None
    counted: np.ndarray | None


class _Trainer:
    def __init__(
        self, config: RunConfig, samples: Samples, heldout: PackedDataset, device: torch.device, rank: int
    ) -> None:
        self.config = config
        self.objective = objectives.training(config.objective)
        self.samples = samples
        self.heldout = heldout
        self.rank = rank
        self.signals = Signals()
        self.watchdog = Watchdog(config.run_directory, rank, config.train)
        self.heartbeat = Heartbeat(config.run_directory, rank)
        kernels.check_fp8(config, device)
        self.engine = Engine(config, device, kernels.attention_kernel(config, device))
        self.step = 0
        self.updates = 0  # applied steps
        self.grad_norm = math.nan  # of the last step whose result was read
        self.divergences: list[float] = []  # of applied steps with a teacher since the last record
        self.drafts: list[float] = []  # losses of draft rows, likewise
        self.skipped: list[int] = []  # the latest consecutive skipped steps
        log.info(_layout(config))
        self.checkpointer = checkpoint.Checkpointer(self.engine, config.run_directory, config.train)
        if config.train.distill:
            checkpoint.load_teacher(self.engine, config.run_directory)
        self._resume(checkpoint.newest(self.config.run_directory))
        self.telemetry = Telemetry(config, active=rank == 0, first_step=self.step)
        self.profiler = profiling.Profiler(config, rank, active=groups.shards().rank() == groups.replicas().rank() == 0)
        self.sample_log: Lines | None = None
        if config.train.log_samples and self.engine.reads_data:
            path = config.run_directory.sample_log_path(rank)
            path.parent.mkdir(exist_ok=True)
            self.sample_log = Lines(path)
        self.flops = training_flops_per_token(config.model) * config.train.global_batch * config.model.length
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = peak * config.cluster.processes if peak else None

    def _resume(self, source: Path | None) -> None:
        """Resume from a checkpoint, or start from the beginning (None)."""
        state: dict[str, Any] = {}
        if source:
            manifest.check_identity(source, self.config)
            facts = checkpoint.load(self.engine, source)
            self.step, state = facts["step"], facts["state"]
            self.updates = facts["updates"]
            for line in schedules.check(state.get("schedule", {}), self.config, self.step):
                log.info("the schedule changes: %s", line)
            log.info("resumed from %s", source)
        self.losses: list[float] = state.get("losses", [])  # of applied steps since the last record
        self.spikes = Spikes(self.config.train.spike_nats, state)
        for line in self.samples.start(self.step, state):
            log.info(line)

    def run(self) -> int:
        """Train the remaining steps, with validation and checkpoints.

        Returns 0, or the flag (``health.REQUEUE``, ``health.STOP``) of a signal after which the state was saved.
        """
        try:
            for rollbacks in range(self.config.train.max_rollbacks + 1):
                if rollbacks:
                    self._roll_back()
                flag = self._run()
                if flag is not None:
                    break
            else:
                raise UserError(self._runaway(f"after {self.config.train.max_rollbacks} rollbacks"))
        except UserError:  # raised on all ranks, which can still finish writing the checkpoint
            self.checkpointer.close()
            raise
        except Exception as error:
            error.step = self.step  # type: ignore[attr-defined]  # for the decision whether to restart
            raise
        finally:
            self.watchdog.arm(10)
        self.profiler.close()
        self.checkpointer.close()
        self.telemetry.close()
        self.watchdog.close()
        return flag

    def _run(self) -> int | None:
        """Train until the last step (0), a signal (its flag), or too many consecutive skipped steps (None)."""
        total, train = self.config.total_steps, self.config.train
        marked, steps = time.perf_counter(), 0
        self.skipped = []
        before: Pending | None = None  # the step that the device still computes while the next step is launched
        with concurrent.futures.ThreadPoolExecutor(1) as loader:
            batch = loader.submit(self.batch, self.step)
            while self.step < total:
                started = time.perf_counter()
                micro_batches = batch.result()
                batch = loader.submit(self.batch, min(self.step + 1, total - 1))
                rate = schedules.learning_rate(self.step, self.config.optimizer, total)
                limit = self.spikes.limit(self.step)
                with self.profiler.step(self.step + 1):
                    running = self.engine.train_step(micro_batches, rate, limit, self.signals.flag)
                flags = self._judge(self.step - 1, before) if before else 0
                done, self.step, steps, before = self.step, self.step + 1, steps + 1, running
                last_of_phase = self.step in (train.steps, total)
                evaluating = self.step % train.eval_every == 0 or last_of_phase
                recording = self.step % train.log_every == 0 or last_of_phase
                saving = self.step % train.checkpoint_every == 0 or last_of_phase
                if (evaluating or recording or saving or flags) and len(self.skipped) < train.max_skipped:
                    flags, before = flags | self._judge(done, running), None
                self.watchdog.step(time.perf_counter() - started)
                self.heartbeat.beat(self.step - (before is not None))
                if len(self.skipped) >= train.max_skipped:
                    return None
                ending = bool(flags) and self.step < total
                # No checkpoint between skipped steps: a rollback to it would not undo the divergence.
                saving = (saving and (not self.skipped or last_of_phase)) or ending
                if recording and self.losses:
                    now = time.perf_counter()
                    self.telemetry.write(self._record(done, rate, (now - marked) / steps))
                    self.losses, marked, steps = [], now, 0
                paused = time.perf_counter()
                profiled = self.profiler.ends_with(self.step)
                if evaluating or saving or profiled:
                    self.watchdog.arm(10)
                if profiled:
                    self.profiler.close()
                if evaluating:
                    self.telemetry.write({"step": self.step, **self.evaluate()})
                if saving:
                    self.save()
                if ending:
                    return STOP if flags >= STOP else REQUEUE
                self.watchdog.go_on()
                marked += time.perf_counter() - paused  # step times exclude validation and checkpoints
        return 0

    def _judge(self, step: int, pending: Pending) -> int:
        """Wait for a step. Records the loss of an applied step, or logs the sample ids of a skipped step.

        Returns the flags of the ranks.
        """
        result = pending.result()
        self.grad_norm = result.grad_norm
        if self.sample_log:
            self._log_samples(step, result.applied)
        if result.applied:
            self.updates += 1
            self.losses.append(result.loss)
            self.divergences += [result.divergence] if result.divergence else []
            self.drafts += [result.drafts] if result.drafts else []
            self.spikes.applied(step, result.loss)
            self.skipped = []
            return result.flags
        self.skipped.append(step)
        loss_is_fine = math.isfinite(result.loss) and result.loss <= self.spikes.limit(step)
        reason = "a gradient is not finite" if loss_is_fine else f"its loss is {result.loss:.4g}"
        batch = self.config.train.global_batch
        ids = self.samples.ids(step * batch, batch)
        if self.rank == 0:
            log.warning("step %d is skipped: %s; its samples (data set, number): %s", step + 1, reason, ids)
        return result.flags

    def _log_samples(self, step: int, applied: bool) -> None:
        """Log the sample ids of this rank in a step."""
        assert self.sample_log is not None
        share = self.config.train.global_batch // self.config.data_parallel
        first = step * self.config.train.global_batch + self.engine.data_rank * share
        line = {"step": step, "first": first, "applied": applied, "ids": self.samples.ids(first, share)}
        self.sample_log.write({**line, "time": time.time()})

    def _roll_back(self) -> None:
        """Roll back to the newest checkpoint, and leave out the samples of the skipped steps."""
        self.watchdog.arm(10)
        self.profiler.close()
        self.checkpointer.wait()
        first, stop = self.skipped[0], self.skipped[-1] + 1
        newest = checkpoint.newest(self.config.run_directory)
        if newest is None:
            raise UserError(self._runaway("and no checkpoint exists for a rollback"))
        self._resume(newest)
        skipped = self.samples.skip(max(first, self.step), stop)
        if self.rank == 0:
            log.warning("rolled back to step %d; the samples of these steps are left out: %s", self.step, list(skipped))
        self.telemetry.rewind(self.step)

    def _runaway(self, why: str) -> str:
        return (
            f"the loss diverged after step {self.skipped[0]} {why}: lower optimizer.lr or raise "
            f"optimizer.warmup_steps, and resume from the newest checkpoint in {self.config.run_directory.checkpoints}"
        )

    def batch(self, step: int) -> Sequence[Rows]:
        """Micro-batches of this rank for a step, on the device."""
        train, config = self.config.train, self.config
        share = train.global_batch // config.data_parallel
        first = self.engine.data_rank * share
        samples = step * train.global_batch + first, share
        tokens, starts, counted = (
            self.samples.read(*samples),
            self.samples.starts(*samples),
            self.samples.counted(*samples),
        )
        micro_batches = []
        for part in self._parts(share):
            slots = range(first + part.start, first + part.stop)
            rows = self.objective.rows(config, tokens[part], step, slots, None if starts is None else starts[part])
            micro_batches.append(rows if counted is None else only(rows, counted[part], self.samples.counted_share))
        return self.engine.upload(micro_batches)

    def evaluate(self) -> dict[str, Any]:
        """Held-out loss of every kind of order of the objective in nats and bits per byte, with averaged weights."""
        config, ranks = self.config, self.config.data_parallel
        # Samples are spread over the split, as neighbours come from the same document.
        count = min(len(self.heldout), config.train.eval_samples)
        indices = np.arange(count)[self.engine.data_rank :: ranks]
        numbers, parts = indices * len(self.heldout) // count, self._parts(len(indices))
        texts = [self._heldout(numbers[part]) for part in parts]
        record: dict[str, Any] = {}
        with self.engine.averaged_weights():
            for kind in self.objective.kinds(config):
                pairs = zip(texts, parts, strict=True)
                rows = [self._heldout_rows(kind, text, indices[part].tolist()) for text, part in pairs]
                total, count = self.engine.evaluate(rows)
                record[f"heldout_{kind}"] = total / count
                record[f"heldout_{kind}_bits_per_byte"] = total / count / _LN2 / self.heldout.bytes_per_token
            if lags := self.objective.lags(config):
                record |= self._drafting(texts, lags)
        return record

    def _heldout(self, numbers: np.ndarray) -> _Texts:
        """The held-out samples ``numbers``."""
        separate = self.config.data.documents == "separate"
        starts = self.heldout.starts(numbers) if separate else None
        counted = self.heldout.flags(numbers, LOSS) if self.heldout.has(LOSS) else None
        return _Texts(self.heldout.read(numbers), starts, counted)

    def _heldout_rows(self, kind: str, texts: _Texts, indices: Sequence[int]) -> Rows:
        """Rows of held-out samples, whose draws depend on the ``indices``."""
        rows = self.objective.heldout_rows(self.config, kind, texts.tokens, indices, texts.starts)
        return rows if texts.counted is None else only(rows, texts.counted, 1.0)

    def _drafting(self, parts: Sequence[_Texts], lags: int) -> dict[str, Any]:
        """Acceptance of drafts on held-out texts, left to right, by the number of tokens that they look ahead."""
        batches: list[Rows] = []
        for texts in parts:
            rows = self._heldout_rows("left_to_right", texts, range(len(texts.tokens)))
            batches += [look_ahead(rows, np.full(texts.tokens.shape, lag)) for lag in range(1, lags + 1)]
        accepted, reached = self.engine.acceptance(batches, lags)
        record = {f"acceptance_{lag}": value for lag, value in enumerate(accepted, start=1)}
        # A pass writes the token that it scores, and the drafted tokens up to the first refused one.
        return record | {"tokens_per_pass": 1 + sum(reached)}

    def save(self) -> None:
        """Start writing a checkpoint of the current step."""
        state = {
            "identity": identity(self.config),
            "schedule": schedules.fields(self.config),
            "samples": self.step * self.config.train.global_batch,
            "losses": self.losses,
            **self.samples.state(),
            **self.spikes.state,
        }
        self.checkpointer.save(self.step, self.updates, state)

    def _parts(self, count: int) -> list[slice]:
        """Split ``count`` samples into micro-batches."""
        size = self.config.train.micro_batch
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _record(self, done: int, rate: float, seconds: float) -> dict[str, Any]:
        """The record of the steps since the last record, of which ``done`` is the last step. Collective."""
        config, loss = self.config, sum(self.losses) / len(self.losses)
        figures = self.engine.rank_figures(profiling.gpu_memory(self.engine.device))
        slow = slow_ranks(figures[:, 0])
        record: dict[str, Any] = {
            "step": self.step,
            "loss": loss,
            "bits_per_byte": loss / _LN2 / self.samples.bytes_per_token,
            "learning_rate": rate,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,
            **self.objective.progress(done, config),
            "tokens": self.step * config.train.global_batch * config.model.length,
            "seconds_per_step": seconds,
            "tokens_per_second": config.train.global_batch * config.model.length / seconds,
        }
        for name, values in (("divergence", self.divergences), ("drafts", self.drafts)):
            if values:
                record[name] = sum(values) / len(values)
                values.clear()
        if slow:
            record["slow_ranks"] = slow
            if self.rank == 0:
                log.warning("step %d: slow ranks (multiple of the median step time): %s", self.step, slow)
        record |= profiling.memory_record(figures[:, 1:])
        if self.peak:
            record["mfu"] = self.flops / seconds / self.peak
        return record


def _layout(config: RunConfig) -> str:
    """The layout of the processes, and the layers of the pipeline stages."""
    parallel = config.parallel
    text = f"{config.cluster.processes} processes: {parallel.describe()} x data {config.data_parallel}"
    text += f" (ZeRO-{parallel.zero})"
    if parallel.pipeline == 1:
        return text
    stages = zip(itertools.pairwise(stage_edges(config)), stage_costs(config), strict=True)
    parts = [
        f"stage {stage % parallel.pipeline}: layers {first}-{last - 1} ({cost:.0%})"
        for stage, ((first, last), cost) in enumerate(stages)
    ]
    return f"{text}; cut{' by FLOPs' if parallel.cut is None else ''}: {', '.join(parts)}"
