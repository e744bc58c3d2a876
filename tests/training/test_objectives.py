"""What each objective learns from a batch: the same data, its noise, and the equality of the two forms of the loss."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armd_scale import orders
from armd_scale.config import RunConfig
from armd_scale.training import objectives, schedules
from tests.conftest import PAPER, tiny_distribution

V, N = 3, 4


def config(objective, **changes):
    fields = {
        "objective": objective,
        "model": PAPER.model_dump(),
        "orders": {"ar_steps": 1, "permutation_steps": 3, "rho": 8, "strided_steps": 2},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 2},
        **changes,
    }
    return RunConfig.model_validate(fields)


def masked_sums(model, text):
    """Sum of the NLL of the masked tokens of a text, for every mask."""
    out = {}
    for mask in itertools.product([False, True], repeat=N):
        seen = torch.tensor([text]).masked_fill(torch.tensor([mask]), V)
        logp = model.predict(model.denoise(seen)).log_softmax(-1)[0]
        out[mask] = -sum(float(logp[n, text[n]]) for n in range(N) if mask[n])
    return out


def test_both_forms_of_the_loss_are_the_bound():
    """RADD: weighing by 1 / t over times, and by N / k over numbers of masked tokens, have one expectation."""
    model = tiny_distribution(V, N, objective="mdm", two_stream_layers=0)
    sums = masked_sums(model, [0, 2, 1, 1])
    exact = sum(value / sum(mask) / math.comb(N, sum(mask)) for mask, value in sums.items() if any(mask))
    for form in ("time", "any-order"):
        means = []
        for step in range(200):
            drawn = [objectives.noise(N, t, form, step, slot) for slot, t in enumerate(objectives.times(64, 0, step))]
            means.append(np.mean([one.weight * sums[tuple(one.masked.tolist())] for one in drawn]))
        error = np.std(means) / math.sqrt(len(means))
        assert abs(np.mean(means) - exact) < 4 * error, form
        assert error < 0.02 * exact, "the test could not tell a wrong weight"


@given(st.integers(1, 40), st.integers(1, 60), st.floats(1e-9, 1 - 1e-9), st.integers(0, 99))
def test_noise(count, length, time, key):
    """One time in each of as many parts; any-order masks exactly k tokens; the same key is the same noise."""
    drawn = objectives.times(count, key)
    assert (np.floor(drawn * count) == np.arange(count)).all()
    assert 0 < drawn.min() <= drawn.max() < 1
    number = 1 + int(length * time)
    one = objectives.noise(length, time, "any-order", key)
    assert one.masked.sum() == number
    assert one.weight == pytest.approx(length / number)
    for form in ("time", "any-order"):
        first, second = (objectives.noise(length, time, form, key) for _ in range(2))
        assert (first.masked == second.masked).all()
    assert objectives.noise(length, time, "time", key).weight == pytest.approx(1 / time)


def test_times_are_uniform():
    """Each place of a batch sees all times in its part."""
    drawn = np.array([objectives.times(4, 0, step) for step in range(2000)])
    assert np.abs(drawn.mean(0) - (np.arange(4) + 0.5) / 4).max() < 4 * (1 / 4) / math.sqrt(12 * 2000)


def test_rows_of_each_objective():
    tokens = np.random.default_rng(0).integers(0, 50, (3, 16))
    slots = [2, 5, 7]
    armd = objectives.training_rows(config("armd"), tokens, 5, slots)
    assert armd.target_positions[0].tolist() == schedules.layout(5, 2, config("armd")).order.tolist()
    ar = objectives.training_rows(config("ar"), tokens, 5, slots)
    assert ar.target_tokens.tolist() == tokens.tolist()
    assert ar.context_tokens[:, 1:].tolist() == tokens[:, :-1].tolist()
    assert ar.visible is None
    assert ar.weights is None
    timed = config("mdm", diffusion={"loss_form": "time"})
    for run in (config("mdm"), timed):
        mdm = objectives.training_rows(run, tokens, 5, slots)
        masked = mdm.context_tokens == 50
        assert mdm.target_tokens.tolist() == tokens.tolist()
        assert bool((mdm.context_tokens[~masked] == mdm.target_tokens[~masked]).all())
        assert bool(((mdm.weights > 0) == masked).all())
        alone = objectives.training_rows(run, tokens[1:2], 5, slots[1:2])
        assert alone.context_tokens.tolist() == mdm.context_tokens[1:2].tolist(), "a rank could not make its part"
    times = objectives.times(8, 0, 5)
    weights = objectives.training_rows(timed, tokens, 5, slots).weights.amax(1)
    assert weights.tolist() == pytest.approx([1 / times[slot] for slot in slots])


def test_phases_are_the_objective_s():
    """The other objectives have neither orders nor strided fine-tuning, whatever the section says."""
    assert config("armd").total_steps == 6
    assert [schedules.phase(step, config("armd")) for step in (0, 2, 5)] == ["left-to-right", "permutation", "strided"]
    for objective, phase in (("ar", "left-to-right"), ("mdm", "masked")):
        run = config(objective)
        assert run.total_steps == 4
        assert {schedules.phase(step, run) for step in range(4)} == {phase}
        assert {schedules.shuffled_tokens(step, run) for step in range(4)} == {0}


def test_held_out_rows_are_the_same_at_every_evaluation():
    tokens = np.random.default_rng(0).integers(0, 50, (4, 16))
    for objective, kinds in objectives.HELDOUT.items():
        run = config(objective)
        assert list(objectives.labels(run)) == list(kinds)
        for kind in kinds:
            whole = objectives.heldout_rows(run, kind, tokens, [0, 1, 2, 3])
            part = objectives.heldout_rows(run, kind, tokens[2:], [2, 3])
            assert part.context_tokens.tolist() == whole.context_tokens[2:].tolist()
            assert part.target_tokens.tolist() == whole.target_tokens[2:].tolist()


@given(st.integers(1, 40), st.data())
def test_a_window_is_shuffled_and_nothing_else(length, data):
    count = data.draw(st.integers(0, length))
    order = orders.window(length, count, data.draw(st.integers(0, 99))).order
    assert sorted(order) == list(range(1, length + 1))
    moved = np.flatnonzero(order != np.arange(1, length + 1))
    assert len(moved) == 0 or moved[-1] - moved[0] < count
