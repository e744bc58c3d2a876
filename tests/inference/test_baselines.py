"""Left-to-right and masked-diffusion models on the standalone network: against the reference, and by enumeration."""

import collections
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armd_scale import orders
from armd_scale.decoding.lanes import STRATEGIES
from armd_scale.inference import FREE, Decoding, InputError
from armd_scale.objectives.mdm import ancestral_blocks
from tests import reference
from tests.conftest import BASELINES, standalone, tiny_distribution

V, N = 3, 3
TEXTS = list(itertools.product(range(V), repeat=N))
MASK = V


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


# Left to right ---------------------------------------------------------------------------------------------------


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
    prompts = [draw.integers(0, 50, size).tolist() for size in sizes]
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
    _chi_square([found[text] for text in TEXTS], expected.tolist())


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


# Masked diffusion ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusion():
    return tiny_distribution(V, N, objective="mdm", two_stream_layers=0)


def _conditionals(model):
    """-log p of each token of each text under each mask: {mask: [texts, N]}."""
    texts, out = torch.tensor(TEXTS), {}
    for mask in itertools.product([False, True], repeat=N):
        hidden = torch.tensor(mask)
        logp = model.predict(model.denoise(texts.masked_fill(hidden, MASK))).log_softmax(-1)
        out[mask] = -logp.gather(-1, texts[..., None])[..., 0]
    return out


def _exact_bound(model):
    """The bound of every text by summing over all masks: a set of k masked tokens counts 1 / (k C(N, k))."""
    total = torch.zeros(len(TEXTS), dtype=torch.float64)
    for mask, nll in _conditionals(model).items():
        k = sum(mask)
        if k:
            total += (nll * torch.tensor(mask)).sum(1) / k / math.comb(N, k)
    return total


def _law(model, steps=None):
    """Probability of every text under the ancestral sampler of K steps (None: one token a step, any order)."""
    conditional, law = _conditionals(model), torch.zeros(len(TEXTS), dtype=torch.float64)
    plans = itertools.permutations(range(N)) if steps is None else itertools.product(range(steps), repeat=N)
    plans = list(plans)  # the step of each position, all equally likely
    for plan in plans:
        nll = torch.zeros(len(TEXTS), dtype=torch.float64)
        for step in sorted(set(plan)):
            mask = tuple(at >= step for at in plan)
            nll += (conditional[mask] * torch.tensor([at == step for at in plan])).sum(1)
        law += (-nll).exp() / len(plans)
    return law


def test_the_bound_is_the_sum_over_all_masks(diffusion):
    texts = torch.tensor(TEXTS)
    exact = _exact_bound(diffusion)
    draws = torch.stack([diffusion.bound(texts, 32, seed) for seed in range(60)])
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact).abs() < 4.5 * error + 1e-12).all())
    # N draws see every number of masked tokens once; the mean over positions is what is left to chance.
    spread, alone = diffusion.bound(texts, 30, 1) - exact, diffusion.bound(texts, 1, 1) - exact
    assert float(spread.abs().mean()) < float(alone.abs().mean())


def test_the_bound_is_one(diffusion):
    """-log p of the sampler is never above it, and what it promises is no more than a distribution."""
    exact, law = _exact_bound(diffusion), _law(diffusion)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((-law.log() <= exact + 1e-12).all())
    assert float((-exact).exp().sum()) <= 1


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_ancestral_sampling_follows_its_law(diffusion, steps):
    """Any number of steps, by enumeration over the steps in which positions are revealed."""
    count = 3000
    found = collections.Counter(
        map(tuple, diffusion.generate(batch=count, seed=3, decoding=Decoding(steps=steps)).tolist())
    )
    _chi_square([found[text] for text in TEXTS], (_law(diffusion, steps) * count).tolist())


def test_a_token_a_step_in_a_given_order(diffusion):
    """A plan of one position a step is the any-order model: p is the product of its conditionals."""
    count, order = 3000, [3, 1, 2]
    conditional, nll, left = _conditionals(diffusion), torch.zeros(len(TEXTS), dtype=torch.float64), set(range(N))
    for position in order:
        nll += conditional[tuple(n in left for n in range(N))][:, position - 1]
        left.remove(position - 1)
    texts = diffusion.fill([[FREE] * N] * count, seed=8, order=order)
    found = collections.Counter(map(tuple, texts.tolist()))
    _chi_square([found[text] for text in TEXTS], ((-nll).exp() * count).tolist())


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 9))
def test_every_position_is_revealed_once(count, steps, key):
    free = list(range(3, 3 + count))
    blocks = ancestral_blocks(free, steps, (key, 0))
    assert sorted(position for block in blocks for position in block) == free
    assert len(blocks) <= min(steps, count)
    assert all(block == sorted(block) for block in blocks)


@pytest.mark.parametrize("kind", ["mdm", "mdm modern"])
def test_texts_of_masked_diffusion_do_not_see_their_neighbours(kind):
    """Prompts, gaps and lengths side by side: each is what it is alone; given tokens stay."""
    model = standalone(BASELINES[kind])
    rows = [[FREE] * 9, [4, FREE, FREE, 7, FREE], [FREE] * 16, [1, 2, 3]]
    together = model.complete(model.plan(rows, Decoding(steps=5), [1, 2, 3, 4]))
    for row, text, seed in zip(rows, together, [1, 2, 3, 4], strict=True):
        [alone] = model.complete(model.plan([row], Decoding(steps=5), [seed]))
        assert torch.equal(text, alone)
        assert all(token in (FREE, got) for token, got in zip(row, text.tolist(), strict=True))
        assert 0 <= int(text.min()) <= int(text.max()) < 50, "the mask token is never written"
    whole = model.generate([[1, 2, 3], [1]], 12, seed=[7, 8])  # as many steps as each has free tokens
    assert torch.equal(whole[0], model.generate([1, 2, 3], 12, seed=[7])[0])
    lanes = STRATEGIES["ancestral"](model, 3, 17, 1)
    tasks = model.plan(rows[:2], Decoding(steps=5), [1, 2])
    lanes.admit({2: tasks[1]})  # two lanes stay idle
    while not bool(lanes.finished()[2]):
        lanes.step()
    assert lanes.text[2, 1:6].tolist() == together[1].tolist()


MASKED_DIFFUSION_REFUSES = {
    "an exact likelihood": (lambda model, tokens: model.nll(tokens), "bound"),
    "logits": (lambda model, tokens: model.logits(tokens), "bound"),
    "a conditional likelihood": (lambda model, tokens: model.conditional_nll(tokens, [1]), "bound"),
    "streams": (lambda model, tokens: model.generate(decoding=Decoding(streams=2)), "streams .* steps"),
    "draft": (lambda model, tokens: model.generate(decoding=Decoding(draft=2)), "draft .* steps"),
    "no draws": (lambda model, tokens: model.bound(tokens, 0), "draws"),
    "an unknown token": (lambda model, tokens: model.bound(tokens + 50), "vocabulary"),
}


@pytest.mark.parametrize("request_", MASKED_DIFFUSION_REFUSES)
def test_masked_diffusion_refuses(request_):
    call, part = MASKED_DIFFUSION_REFUSES[request_]
    with pytest.raises(InputError, match=part):
        call(standalone(BASELINES["mdm"]), torch.zeros(1, 8, dtype=torch.long))


def test_other_objectives_refuse_steps():
    with pytest.raises(InputError, match="steps .* streams or draft"):
        tiny_distribution(V, N).generate(decoding=Decoding(steps=4))


def _chi_square(found, expected):
    """Sampled counts against expected ones, at about five standard deviations of the statistic."""
    statistic = sum((a - b) ** 2 / b for a, b in zip(found, expected, strict=True))
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), statistic
