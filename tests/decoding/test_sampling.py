"""Sampling: truncation and draws against slow references."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armd_scale.decoding import lanes as decoding
from armd_scale.decoding.sampling import Sampler, draw
from armd_scale.inference import Decoding


def test_a_token_is_kept_with_the_ratio_of_its_probabilities():
    p, q = torch.tensor([0.5, 0.2, 0.3, 0.4]), torch.tensor([0.1, 0.6, 0.3, 0.0])
    uniform = (torch.arange(10_000)[:, None] + 0.5) / 10_000
    assert decoding.accept(p, q, uniform).double().mean(0).tolist() == pytest.approx([0.2, 1, 1, 0], abs=1e-9)


@given(st.data())
def test_truncation_against_a_slow_reference(data):
    """Each sequence with its own temperature, top-k, top-p and min-p."""
    ways = [
        Decoding(
            temperature=data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
            top_k=data.draw(st.sampled_from([0, 1, 3, 50])),
            top_p=data.draw(st.sampled_from([1.0, 0.9, 0.5, 1e-3])),
            min_p=data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        )
        for _ in range(3)
    ]
    logits = 3 * torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).double()
    sampler = Sampler(3, torch.device("cpu"))
    for lane, way in enumerate(ways):
        sampler.set(lane, way)
    got = sampler.probabilities(logits)
    for lane, way in enumerate(ways):
        for row in range(2):
            scores = logits[lane, row].tolist()
            if way.temperature == 0:
                expected = [float(index == scores.index(max(scores))) for index in range(7)]
            else:
                weights = [math.exp((s - max(scores)) / way.temperature) for s in scores]
                ranked = sorted(range(7), key=lambda index: -weights[index])[: way.top_k or 7]
                total, before, kept = sum(weights[i] for i in ranked), 0.0, []
                for index in ranked:
                    if before < way.top_p * total or way.top_p == 1:
                        kept.append(index)
                    before += weights[index]
                kept = [i for i in kept if weights[i] >= way.min_p * max(weights)]
                expected = [weights[i] / sum(weights[j] for j in kept) if i in kept else 0.0 for i in range(7)]
            assert got[lane, row].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("vocab", [2, 256, 257, 70_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_invert_the_cumulative_sum(vocab, dtype):
    """As often as their weights say, to the rarest entry; an entry without weight is never drawn."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(vocab, generator=generator, dtype=dtype) ** 4
    weights[:: max(2, vocab // 7)] = 0
    sums = torch.cat([torch.zeros(1), weights.double().cumsum(0)]) / weights.double().sum()
    entries = [*(weights > 0).nonzero()[:: max(1, vocab // 50), 0].tolist(), int((weights > 0).nonzero()[-1])]
    for entry in entries:
        width = sums[entry + 1] - sums[entry]
        # Sums of float32 weights are rounded: the place of an interval moves by 1e-7, its width does not change.
        if dtype == torch.float64 or width > 1e-5:
            inside = sums[entry] + width * torch.tensor([0.1, 0.5, 0.9]).double()
            assert draw(weights.expand(1, 3, -1), inside[None]).tolist() == [[entry] * 3]
    edges = torch.tensor([[0.0, 1 - 2**-53, *torch.rand(200, generator=generator)]], dtype=torch.float64)
    assert (weights[draw(weights.expand(1, 202, -1), edges)] > 0).all()


def test_rare_tokens_are_drawn():
    """A token of probability 5e-8 in float32, beside which a sum over the vocabulary would round it away."""
    weights = torch.rand(300, generator=torch.Generator().manual_seed(0))
    weights[100] = 5e-8 * weights.sum()
    start = weights[:100].double().sum() / weights.double().sum()
    around = start + torch.linspace(-1e-6, 1e-6, 20_001).double()
    drawn = draw(weights.expand(1, 20_001, -1), around[None])
    assert float((drawn == 100).double().mean()) == pytest.approx(5e-8 / 2e-6, rel=0.05)
