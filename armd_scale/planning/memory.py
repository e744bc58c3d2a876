"""Memory of a rank: weights, gradients, optimiser states, buffers, and activations of the micro-batches in flight.

The activations are measured on the real network (``measure``). The other terms model the allocations of DeepSpeed 0.19;
``tests/planning`` compares the sum with the allocations of real runs.
"""

from dataclasses import asdict, dataclass

from armd_scale.config import RunConfig
from armd_scale.parallel.zero import BUCKET
from armd_scale.planning.measure import StageCost
from armd_scale.planning.schedule import operations

_GATHERED = 1_000_000_000
"""Most weights that ZeRO-3 keeps gathered: DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by kind at the peak of their sum."""

    weights: float
    gradients: float
    optimizer: float
    """Float32 master weights, moments and moving average."""
    activations: float
    buffers: float
    """Buffers of collectives."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def rank_memory(config: RunConfig, rank: int, stages: list[StageCost], frozen: float = 0.0) -> Memory:
    """The largest moment of a pipeline rank: in the passes, in the reduction, or in the update.

    ``frozen``: number of weights that are not trained.
    """
    zero, ranks = config.parallel.zero, config.replicas
    low = config.train.dtype == "bfloat16"
    states = sum(stage.parameters for stage in stages)
    largest = max(stage.largest for stage in stages)
    width = 2 if low else 4
    shard = states / (ranks if zero else 1)
    kinds = (2 if zero == 0 else 3) + (config.optimizer.ema > 0)
    optimizer = 4 * kinds * shard
    bucket = min(BUCKET, states)
    shared = max(stage.shared for stage in stages)
    weights, resident, gathered = width * states, 0.0, 0.0
    if zero == 3:
        weights = width * shard
        resident = 4 * shard + 4 * bucket  # gradients of this rank's shard, and the bucket, allocated at the start
        gathered = width * min(states, _GATHERED)
    if low and zero == 1:
        resident = 4 * states  # gradients accumulate in float32
    grads = width * states if not (low and zero == 1) else width * largest
    reduction = {
        0: 16 * largest,  # squares in float64
        1: 0 if low else 4 * bucket + 4 * shard,
        2: 6 * bucket + 4 * shard if low else 4 * shard,
        3: 4 * bucket if low else 0,
    }[zero]
    filling = 4 * bucket if zero == 1 and not low else 0  # the bucket exists from the first gradient on
    # Input of the optimiser beside its states: the flattened gradients of its shard.
    update = {0: grads, 1: 0 if low else 8 * shard, 2: (4 if low else 8) * shard, 3: 4 * shard}[zero]
    weights += width * frozen
    activations = _in_flight(config, rank, stages)
    moments = [
        # With ZeRO-3 the gradients of a layer replace its gathered weights.
        Memory(weights + gathered, resident + (0 if zero == 3 else grads), optimizer, activations, shared + filling),
        Memory(weights, resident + grads, optimizer, 0.0, shared + reduction),
        Memory(weights, resident + update, optimizer, 0.0, shared),
    ]
    return max(moments, key=lambda memory: memory.total)


def _in_flight(config: RunConfig, rank: int, stages: list[StageCost]) -> float:
    """Most bytes that the micro-batches in flight on a rank keep, with the largest working set of a pass."""
    parallel = config.parallel
    alive = peak = 0.0
    for operation in operations(rank, parallel.pipeline, parallel.chunks, config.micro_batches):
        stage = stages[operation.chunk]
        if operation.backward:
            alive -= stage.kept
            peak = max(peak, alive + stage.backward.peak)
        else:
            peak = max(peak, alive + stage.forward.peak)
            alive += stage.kept
    return peak
