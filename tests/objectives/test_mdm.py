"""Masked-diffusion models on the standalone network: by enumeration."""

import collections
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armd_scale.decoding.lanes import STRATEGIES
from armd_scale.inference import FREE, Decoding, InputError
from armd_scale.objectives.mdm import ancestral_blocks
from tests import reference
from tests.conftest import BASELINES, standalone, tiny_distribution

V, N = 3, 3


TEXTS = list(itertools.product(range(V), repeat=N))


MASK = V


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
    reference.chi_square([found[text] for text in TEXTS], (_law(diffusion, steps) * count).tolist())


def test_a_token_a_step_in_a_given_order(diffusion):
    """A plan of one position a step is the any-order model: p is the product of its conditionals."""
    count, order = 3000, [3, 1, 2]
    conditional, nll, left = _conditionals(diffusion), torch.zeros(len(TEXTS), dtype=torch.float64), set(range(N))
    for position in order:
        nll += conditional[tuple(n in left for n in range(N))][:, position - 1]
        left.remove(position - 1)
    texts = diffusion.fill([[FREE] * N] * count, seed=8, order=order)
    found = collections.Counter(map(tuple, texts.tolist()))
    reference.chi_square([found[text] for text in TEXTS], ((-nll).exp() * count).tolist())


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
