"""The schedules of the plan against the passes that Megatron-Core really makes, and what their simulation must obey."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armd_scale.config import RunConfig
from armd_scale.planning.schedule import bubble, operations, simulate
from tests.conftest import PAPER, run_processes


def _passes(rank, count, rendezvous, run):
    from armd_scale import orders
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine
    from armd_scale.rows import arrange

    device, length = torch.device("cpu"), run.model.length
    groups.start(run.parallel, rank=rank, processes=count, rendezvous=rendezvous, device=device)
    engine = Engine(run, device)
    tokens = np.zeros((run.train.micro_batch, length), dtype=np.int64)
    rows = [arrange(tokens, orders.left_to_right(length), 1) for _ in range(run.micro_batches)]
    with engine.recording() as passes:
        engine.train_step(rows, 1e-3)
    engine.train_step(rows, 1e-3)  # not recorded
    groups.stop()
    return passes


@pytest.mark.parametrize(
    ("pipeline", "chunks", "micro_batches"), [(1, 1, 3), (2, 1, 4), (4, 1, 2), (4, 1, 6), (2, 2, 2), (2, 2, 6)]
)
def test_real_ranks_follow_the_schedule(pipeline, chunks, micro_batches):
    run = RunConfig.model_validate(
        {
            "model": PAPER.model_dump(),
            "orders": {"ar_steps": 1, "permutation_steps": 1, "rho": 8},
            "train": {"steps": 2, "global_batch": micro_batches, "micro_batch": 1, "dtype": "float32"},
            "parallel": {"pipeline": pipeline, "chunks": chunks},
            "cluster": {"tasks_per_node": pipeline},
        }
    )
    real = run_processes(pipeline, _passes, run)
    for rank, passes in enumerate(real):
        expected = operations(rank, pipeline, chunks, micro_batches)
        assert [timed.backward for timed in passes] == [operation.backward for operation in expected]
        assert all(timed.stop >= timed.start for timed in passes)


shapes = st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.integers(1, 5)).map(
    lambda shape: (shape[0], shape[1] if shape[0] > 1 else 1, shape[2] * shape[0])
)


@given(shapes, st.floats(0.1, 3.0))
def test_simulated_steps(shape, ratio):
    """Every pass happens once, after what it needs; equal stages have the bubble of the papers."""
    pipeline, chunks, micro_batches = shape
    spans = simulate(pipeline, chunks, micro_batches, [(1.0, ratio)] * (pipeline * chunks))
    stops = {}
    for rank, row in enumerate(spans):
        assert len({span.operation for span in row}) == len(row) == 2 * chunks * micro_batches
        assert all(one.stop <= two.start for one, two in itertools.pairwise(row))
        for span in row:
            key = span.operation.backward, span.operation.chunk * pipeline + rank, span.operation.micro_batch
            stops[key] = span.stop
    for (backward, run, number), stop in stops.items():
        before = stops.get((backward, run + (1 if backward else -1), number))
        assert before is None or stop >= before + (ratio if backward else 1.0) - 1e-9
        assert not backward or stop >= stops[False, run, number] + ratio - 1e-9
    if chunks == 1:  # arXiv 2104.04473, section 2.2: (p - 1) of m + p - 1
        assert bubble(spans) == pytest.approx((pipeline - 1) / (micro_batches + pipeline - 1))
    elif pipeline > 1:
        plain = simulate(pipeline, 1, micro_batches, [(chunks * 1.0, chunks * ratio)] * pipeline)
        assert bubble(spans) <= bubble(plain) + 1e-9
