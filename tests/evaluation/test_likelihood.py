"""Scores and the simple models beside them, against direct computations."""

import lzma
import math

import numpy as np
import pytest
import torch

from armd_scale import orders
from armd_scale.data import shards
from armd_scale.data.shards import PackedDataset
from armd_scale.errors import UserError
from armd_scale.evaluation import likelihood, report
from armd_scale.evaluation.models import alone
from armd_scale.inference import InputError
from tests.conftest import BASELINES, MODELS, standalone


@pytest.mark.parametrize("order", ["left-to-right", "shuffled:5", "strided:4"])
@pytest.mark.parametrize("tokens", [64, 70, 5])
def test_score_is_the_sum_over_all_chunks(order, tokens):
    model = standalone(MODELS["paper"])
    text = np.random.default_rng(0).integers(0, 50, tokens)
    chunks = likelihood.cut(text, 16)
    assert np.array_equal(np.concatenate(chunks), text)
    score = likelihood.score(alone(model), chunks, order, 100, repeats=2)
    total = 0.0
    for number, chunk in enumerate(chunks):
        n = len(chunk)
        layouts = {
            "left-to-right": [orders.left_to_right(n)],
            "shuffled:5": [orders.shuffled(n, min(5, n), draw, number) for draw in (0, 1)],
            "strided:4": [orders.strided(n, 4)],
        }
        for layout in layouts[order]:
            order_n, blocks = (torch.from_numpy(np.array(field)) for field in layout)
            nll = model.nll(torch.from_numpy(chunk)[None], order_n, blocks)
            total += float(nll.sum()) / len(layouts[order])
    assert score.tokens == tokens
    assert score.nll == pytest.approx(total / tokens)
    assert score.perplexity == pytest.approx(np.exp(total / tokens))
    assert score.bits_per_byte == pytest.approx(total / np.log(2) / 100)


@pytest.mark.parametrize("length", [2, 3, 16])
def test_infilling_counts_the_middle_third(length):
    model = standalone(MODELS["paper"])
    text = np.random.default_rng(0).integers(0, 50, length)
    score = likelihood.score(alone(model), [text], "infill", 7 * length)
    gap = list(range(1 + length // 3, 1 + length - length // 3))
    given = [place for place in range(1, length + 1) if place not in gap]
    nll = float(model.conditional_nll(text.tolist(), gap, given).sum())
    assert score.tokens == len(gap)
    assert score.nll == pytest.approx(nll / len(gap), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nll / len(gap) / np.log(2) / 7, rel=1e-5)


@pytest.mark.parametrize("order", ["left-to-right", "strided:2", "shuffled:9"])
def test_losses_by_place_are_means_over_the_places(order):
    """In a strided order the place counts from the first token of the stream."""
    model = standalone(MODELS["paper"].model_copy(update={"length": 70}))
    chunks = likelihood.cut(np.random.default_rng(0).integers(0, 50, 70 * 18 + 20), 70)
    expected = {}
    for number, chunk in enumerate(chunks):
        layout = likelihood.layout(order, len(chunk), number)
        nll = model.nll(torch.from_numpy(chunk)[None], *(torch.from_numpy(np.array(field)) for field in layout))[0]
        for position, value in enumerate(nll.tolist(), start=1):
            place = (position - 1) % math.ceil(len(chunk) / 2) + 1 if order == "strided:2" else position
            first, last = next((low + 1, high) for low, high in GROUPS if low < place <= high)
            expected.setdefault((first, last), []).append(value)
    found = likelihood.by_place(alone(model), chunks, order)
    assert [(group["first"], group["last"]) for group in found] == sorted(expected)
    assert sum(group["tokens"] for group in found) == sum(map(len, chunks))
    for group in found:
        assert group["nll"] == pytest.approx(np.mean(expected[group["first"], group["last"]]), rel=1e-6)
    with pytest.raises(UserError, match="by place"):
        likelihood.by_place(alone(model), chunks, "infill")


GROUPS = (0, 16), (16, 32), (32, 64), (64, 128)


def test_orders_differ():
    model = standalone(MODELS["paper"])
    chunks = likelihood.cut(np.arange(48) % 50, 16)
    kinds = ("left-to-right", "shuffled:16", "strided:4")
    scores = [likelihood.score(alone(model), chunks, order, 1) for order in kinds]
    assert len({score.nll for score in scores}) == 3
    assert [score.nll_se > 0 for score in scores] == [False, True, False]


@pytest.mark.parametrize(
    ("config", "order"),
    [
        pytest.param(BASELINES["mdm"], "bound", id="mdm-bound"),
        pytest.param(MODELS["paper"], "shuffled:16", id="armd-shuffled"),
    ],
)
def test_the_error_of_what_is_drawn(config, order):
    """The mean over draws, and its spread over many repetitions."""
    text = likelihood.cut(np.random.default_rng(1).integers(0, 50, 64), 16)
    model = standalone(config)
    whole = likelihood.score(alone(model), text, order, 1, repeats=64)
    few = likelihood.score(alone(model), text, order, 1, repeats=4)
    assert abs(few.nll - whole.nll) < 5 * few.nll_se
    assert whole.nll_se == pytest.approx(few.nll_se / 4, rel=0.9)


@pytest.mark.parametrize(("kind", "order"), [("ar", "left-to-right"), ("mdm", "bound")])
def test_what_a_baseline_is_scored_in(kind, order):
    assert likelihood.default_orders(standalone(BASELINES[kind])) == [order]


@pytest.mark.parametrize(
    ("kind", "order", "line"),
    [
        ("mdm", "left-to-right", "use bound"),
        ("ar", "bound", "exact nll"),
        ("ar", "strided:2", "left to right only"),
    ],
)
def test_what_a_baseline_is_not_scored_in(kind, order, line):
    chunks = likelihood.cut(np.arange(32) % 50, 16)
    with pytest.raises(InputError, match=line):
        likelihood.score(alone(standalone(BASELINES[kind])), chunks, order, 1)


@pytest.mark.parametrize("name", ["zigzag", "strided", "strided:0", "shuffled:-1", "shuffled:\u00b2"])
def test_unknown_orders(name):
    with pytest.raises(UserError, match="unknown order"):
        likelihood.parse_order(name)


def test_nothing_to_score():
    with pytest.raises(UserError, match="nothing to score"):
        likelihood.score(alone(standalone(MODELS["paper"])), [], "left-to-right", 1)


def test_the_simple_models(tmp_path):
    train = np.array([3, 3, 3, 4, 4, 5, 3, 3], dtype=np.uint16)
    written = [shards.write_shard(tmp_path, place, train, 4) for place in shards.cut(8, 4, 8)]
    shards.write_index(tmp_path, written, 4, {"tokens": 8, "vocab_size": 6, "bytes": 10})
    tokens = np.array([3, 5, 0])
    probabilities = (np.array([0, 0, 0, 5, 2, 1]) + 1) / 14
    expected = -np.log2(probabilities[tokens]).sum() / 7
    assert report.unigram_bits_per_byte(PackedDataset(tmp_path), tokens, 7) == pytest.approx(expected)
    text = b"to be or not to be, " * 50
    assert report.xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
