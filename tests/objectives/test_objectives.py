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
from armd_scale.objectives import armd, mdm
from armd_scale.objectives.interface import training
from armd_scale.traits import TRAITS
from tests import reference
from tests.conftest import BASELINES, PAPER, standalone, tiny_distribution

V, N = 3, 4


GROUPS = {"ar_steps": 1, "permutation_steps": 3, "rho": 8, "strided_steps": 2, "groups": [2, 4]}


def config(objective, **changes):
    fields = {
        "objective": objective,
        "model": PAPER.model_dump(),
        "orders": {"ar_steps": 1, "permutation_steps": 3, "rho": 8, "strided_steps": 2},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 2},
        **changes,
    }
    return RunConfig.model_validate(fields)


def kinds(objective):
    return training(objective).kinds(config(objective, orders=GROUPS))


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
            drawn = [mdm.noise(N, t, form, step, slot) for slot, t in enumerate(mdm.times(64, 0, step))]
            means.append(np.mean([one.weight * sums[tuple(one.masked.tolist())] for one in drawn]))
        error = np.std(means) / math.sqrt(len(means))
        assert abs(np.mean(means) - exact) < 4 * error, form
        assert error < 0.02 * exact, "the test could not tell a wrong weight"


@given(st.integers(1, 40), st.integers(1, 60), st.floats(1e-9, 1 - 1e-9), st.integers(0, 99))
def test_noise(count, length, time, key):
    """One time in each of as many parts; any-order masks exactly k tokens; the same key is the same noise."""
    drawn = mdm.times(count, key)
    assert (np.floor(drawn * count) == np.arange(count)).all()
    assert 0 < drawn.min() <= drawn.max() < 1
    number = 1 + int(length * time)
    one = mdm.noise(length, time, "any-order", key)
    assert one.masked.sum() == number
    assert one.weight == pytest.approx(length / number)
    for form in ("time", "any-order"):
        first, second = (mdm.noise(length, time, form, key) for _ in range(2))
        assert (first.masked == second.masked).all()
    assert mdm.noise(length, time, "time", key).weight == pytest.approx(1 / time)


def test_times_are_uniform():
    """Each place of a batch sees all times in its part."""
    drawn = np.array([mdm.times(4, 0, step) for step in range(2000)])
    assert np.abs(drawn.mean(0) - (np.arange(4) + 0.5) / 4).max() < 4 * (1 / 4) / math.sqrt(12 * 2000)


TOKENS = np.random.default_rng(0).integers(0, 50, (4, 16))


SLOTS = [1, 2, 5, 7]


def test_rows_of_armd_are_in_the_order_of_the_step():
    rows = training("armd").rows(config("armd"), TOKENS, 5, SLOTS)
    assert rows.target_positions[1].tolist() == armd.TRAINING.layout(5, 2, config("armd")).order.tolist()


def test_rows_of_ar_are_shifted_by_one():
    rows = training("ar").rows(config("ar"), TOKENS, 5, SLOTS)
    assert rows.target_tokens.tolist() == TOKENS.tolist()
    assert rows.context_tokens[:, 1:].tolist() == TOKENS[:, :-1].tolist()
    assert rows.visible is None
    assert rows.weights is None


@pytest.mark.parametrize("form", ["time", "any-order"])
def test_rows_of_mdm_weigh_masked_tokens_alone(form):
    run = config("mdm", diffusion={"loss_form": form})
    rows = training("mdm").rows(run, TOKENS, 5, SLOTS)
    masked = rows.context_tokens == 50
    assert rows.target_tokens.tolist() == TOKENS.tolist()
    assert bool((rows.context_tokens[~masked] == rows.target_tokens[~masked]).all())
    assert bool(((rows.weights > 0) == masked).all())
    if form == "time":
        times = mdm.times(8, 0, 5)
        assert rows.weights.amax(1).tolist() == pytest.approx([1 / times[slot] for slot in SLOTS])


@pytest.mark.parametrize("objective", TRAITS)
def test_a_rank_makes_its_part_of_a_batch_alone(objective):
    run = config(objective)
    whole, part = (training(objective).rows(run, TOKENS[rows], 5, SLOTS[rows]) for rows in (slice(4), slice(1, 3)))
    for name in ("context_tokens", "target_tokens", "target_positions", "weights"):
        of_whole, of_part = getattr(whole, name), getattr(part, name)
        assert (of_part is None and of_whole is None) or torch.equal(of_part, of_whole[1:3])


def test_phases_of_armd():
    run = config("armd")
    assert run.total_steps == 6
    phases = [training("armd").progress(step, run)["phase"] for step in (0, 2, 5)]
    assert phases == ["left-to-right", "permutation", "strided"]
    assert [name for name, *_ in training("armd").spans(run)] == ["left to right", "progressive permutation", "strided"]


def test_groups_and_a_share_left_to_right():
    """The kind of a step is drawn; groups are in the steps with all shuffled tokens."""
    order = {
        "ar_steps": 100, "permutation_steps": 200, "rho": 4, "strided_steps": 1000, "streams": [2],
        "left_to_right_share": 0.25, "groups": [2, 4], "group_share": 0.5, "group_decay": 1.0,
    }  # fmt: skip
    run, kind = config("armd", orders=order, train={"steps": 2000}), training("armd")
    kinds = [kind.phase(step, run) for step in range(3000)]
    assert set(kinds[:100]) == {"left-to-right"}
    assert set(kinds[100:200]) == {"left-to-right", "permutation"}
    for name, count in (("left-to-right", 450), ("groups", 900), ("permutation", 450)):
        assert kinds[200:2000].count(name) == pytest.approx(count, abs=90)
    assert kinds[2000:].count("left-to-right") == pytest.approx(250, abs=60)
    assert set(kinds[2000:]) == {"left-to-right", "strided"}
    step = kinds.index("groups")
    rows = kind.rows(run, np.ones((5, 16), dtype=np.int64), step, range(5))
    size = orders.draw_group([2, 4], 0, step)
    assert rows.visible is not None
    assert len({int(row[0]) for row in rows.visible.target_of_target}) > 1, "texts begin with groups of any size"
    torch.testing.assert_close(rows.weights.mean(-1), torch.ones(5))
    assert rows.weights.unique().numel() >= size
    assert kind.rows(run, np.ones((5, 16), dtype=np.int64), kinds.index("permutation"), range(5)).weights is None


@pytest.mark.parametrize("objective", [name for name, traits in TRAITS.items() if not traits.phases])
def test_an_objective_without_phases_ignores_the_section_of_orders(objective):
    run = config(objective)
    assert run.total_steps == 4
    steps = [training(objective).progress(step, run) for step in range(4)]
    assert all(step == {**steps[0], "shuffled": 0, "streams": 1} for step in steps)
    assert training(objective).spans(run) == []


@pytest.mark.parametrize(("objective", "kind"), [(name, kind) for name in TRAITS for kind in kinds(name)])
def test_held_out_rows_are_the_same_at_every_evaluation(objective, kind):
    run = config(objective, orders=GROUPS)
    whole = training(objective).heldout_rows(run, kind, TOKENS, [0, 1, 2, 3])
    part = training(objective).heldout_rows(run, kind, TOKENS[2:], [2, 3])
    assert part.context_tokens.tolist() == whole.context_tokens[2:].tolist()
    assert part.target_tokens.tolist() == whole.target_tokens[2:].tolist()


@given(st.integers(1, 40), st.data())
def test_a_window_is_shuffled_and_nothing_else(length, data):
    count = data.draw(st.integers(0, length))
    order = orders.window(length, count, data.draw(st.integers(0, 99))).order
    assert sorted(order) == list(range(1, length + 1))
    moved = np.flatnonzero(order != np.arange(1, length + 1))
    assert len(moved) == 0 or moved[-1] - moved[0] < count


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("length", [16, 7])
def test_equals_the_reference(kind, length):
    model = standalone(BASELINES[kind])
    vocab = model.config.vocab_size
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, vocab, (2, length)))
    if model.config.traits.exact:
        got, seen = model.logits(tokens), tokens
    else:
        seen = tokens.masked_fill(torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.4, vocab)
        got = model.predict(model.denoise(seen))
    natural = range(1, length + 1)
    for row in range(2):
        logp = reference.log_probabilities(model.state_dict(), model.config, seen[row].tolist(), natural, natural)
        torch.testing.assert_close(got[row].log_softmax(-1), logp, atol=2e-5, rtol=1e-5)
