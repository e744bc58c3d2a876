"""Left-to-right models on the standalone network: by enumeration."""

import collections
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armd_scale import orders
from armd_scale.inference import FREE, Decoding, InputError
from tests import reference
from tests.conftest import BASELINES, standalone, tiny_distribution

V, N = 3, 3


TEXTS = list(itertools.product(range(V), repeat=N))


def test_left_to_right_is_a_distribution():
    """The probabilities of all texts sum to 1, and each is the token-by-token product."""
    model = tiny_distribution(V, N, objective="ar", two_stream_layers=0)
    nll = model.nll(torch.tensor(TEXTS))
    assert float((-nll.sum(1)).exp().sum()) == pytest.approx(1, abs=1e-12)
    for text in ([0, 1, 2], [2, 2, 0]):
        parts = [model.conditional_nll(text[: n + 1], [n + 1], range(1, n + 1))[0, 0] for n in range(N)]
        torch.testing.assert_close(torch.stack(parts), model.nll(torch.tensor([text]))[0], atol=1e-12, rtol=0)


def test_left_to_right_is_causal_bit_for_bit():
    model = standalone(BASELINES["ar modern"])
    tokens = torch.arange(16)[None] % 50
    before = model.logits(tokens)
    for changed in range(16):
        other = tokens.clone()
        other[0, changed] = 49
        assert torch.equal(model.logits(other)[0, : changed + 1], before[0, : changed + 1])


@pytest.mark.parametrize("kind", ["ar", "ar modern"])
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_cached_decoding_is_the_one_pass_forward(kind, sizes, seed):
    """Prompts of any length side by side; the likeliest token of the whole pass is the one written."""
    model = standalone(BASELINES[kind])
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(2, 50, size).tolist() for size in sizes]  # none begins with BOS
    texts = model.generate(prompts, 12, Decoding(temperature=0))
    sampled = model.generate(prompts, 12, seed=list(range(len(prompts))))
    for row, prompt in enumerate(prompts):
        expected = model.logits(texts[row][None])[0].argmax(-1)[len(prompt) :]
        assert texts[row].tolist() == prompt + expected.tolist()
        alone = model.generate([prompt], 12, seed=[row])
        assert torch.equal(sampled[row], alone[0])


def test_left_to_right_sampling_follows_the_model():
    model = tiny_distribution(V, N, objective="ar", two_stream_layers=0)
    count = 3000
    found = collections.Counter(map(tuple, model.generate(batch=count, seed=5).tolist()))
    expected = (-model.nll(torch.tensor(TEXTS)).sum(1)).exp() * count
    reference.chi_square([found[text] for text in TEXTS], expected.tolist())


LEFT_TO_RIGHT_REFUSES = {
    "an order": (lambda model, tokens: model.nll(tokens, _order(orders.shuffled(8, 8, 1))[0]), "left to right only"),
    "blocks": (lambda model, tokens: model.nll(tokens, *_order(orders.strided(8, 2))), "left to right only"),
    "a later token as context": (lambda model, tokens: model.conditional_nll(tokens, [1], [2]), "left to right only"),
    "streams": (lambda model, tokens: model.generate(decoding=Decoding(streams=2)), "streams"),
    "draft": (lambda model, tokens: model.generate(decoding=Decoding(draft=2)), "draft"),
    "steps": (lambda model, tokens: model.generate(decoding=Decoding(steps=4)), "steps"),
    "gaps": (lambda model, tokens: model.fill([1, FREE, 2]), "gaps"),
    "an order of decoding": (lambda model, tokens: model.fill([1, FREE, FREE], order=[3, 2]), "order"),
    "a bound": (lambda model, tokens: model.bound(tokens), "nll"),
}


def _order(layout):
    return [torch.from_numpy(np.array(field)) for field in layout]


@pytest.mark.parametrize("request_", LEFT_TO_RIGHT_REFUSES)
def test_left_to_right_refuses(request_):
    call, part = LEFT_TO_RIGHT_REFUSES[request_]
    with pytest.raises(InputError, match=part):
        call(standalone(BASELINES["ar"]), torch.zeros(1, 8, dtype=torch.long))
