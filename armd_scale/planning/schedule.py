"""Megatron-Core's pipeline schedules as lists of operations, and their simulation.

- ``operations``: the passes of a pipeline rank in a step, in order: 1F1B (arXiv 2104.04473, figure 4) and interleaved;
- ``simulate``: start and end of each operation, if it starts once its rank is free and its input has arrived.

``tests/planning`` compares the lists with the operations of real ranks.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class Operation(NamedTuple):
    """A forward or backward pass of a micro-batch through a virtual stage of a rank."""

    backward: bool
    chunk: int
    micro_batch: int


class Span(NamedTuple):
    """An operation with its start and end, in the unit of the durations."""

    operation: Operation
    start: float
    stop: float


def operations(rank: int, pipeline: int, chunks: int, micro_batches: int) -> list[Operation]:
    """The passes of pipeline rank ``rank`` in a step, in order."""
    total = chunks * micro_batches
    forward, backward = [], []
    for first in range(0, micro_batches, pipeline if chunks > 1 else micro_batches):
        group = range(first, min(first + pipeline, micro_batches) if chunks > 1 else micro_batches)
        forward += [Operation(False, chunk, number) for chunk in range(chunks) for number in group]
        backward += [Operation(True, chunk, number) for chunk in reversed(range(chunks)) for number in group]
    if pipeline == 1:
        warmup = 0
    elif chunks == 1:
        warmup = pipeline - rank - 1
    else:
        warmup = 2 * (pipeline - rank - 1) + (chunks - 1) * pipeline
    warmup = min(warmup, total)
    steady = [op for pair in zip(forward[warmup:], backward, strict=False) for op in pair]
    return forward[:warmup] + steady + backward[total - warmup :]


def simulate(
    pipeline: int,
    chunks: int,
    micro_batches: int,
    durations: Sequence[tuple[float, float]],
    transfers: Sequence[float] | None = None,
) -> list[list[Span]]:
    """Spans of every rank.

    ``durations``: (forward, backward) of each virtual stage, number chunk * pipeline + rank. ``transfers``: time to
    send the output of each virtual stage but the last to the next stage, or a gradient back.
    """
    runs = pipeline * chunks
    waiting = [deque(operations(rank, pipeline, chunks, micro_batches)) for rank in range(pipeline)]
    spans: list[list[Span]] = [[] for _ in range(pipeline)]
    done: dict[tuple[bool, int, int], float] = {}
    while any(waiting):
        progress = False
        for rank, queue in enumerate(waiting):
            while queue:
                op = queue[0]
                run = op.chunk * pipeline + rank
                before = run + 1 if op.backward else run - 1
                ready = 0.0
                if 0 <= before < runs:
                    ended = done.get((op.backward, before, op.micro_batch))
                    if ended is None:
                        break
                    ready = ended + (transfers[min(run, before)] if transfers else 0.0)
                start = max(ready, spans[rank][-1].stop if spans[rank] else 0.0)
                stop = start + durations[run][op.backward]
                spans[rank].append(Span(op, start, stop))
                done[op.backward, run, op.micro_batch] = stop
                queue.popleft()
                progress = True
        assert progress, "a schedule that waits for itself"
    return spans


def bubble(spans: list[list[Span]]) -> float:
    """Idle share of the ranks' time from the first start to the last end."""
    start = min(rank[0].start for rank in spans)
    stop = max(span.stop for rank in spans for span in rank)
    busy = sum(span.stop - span.start for rank in spans for span in rank)
    return 1 - busy / ((stop - start) * len(spans))
