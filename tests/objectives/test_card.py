"""CARD: its noise and weights against the definitions, its law by enumeration, its decoding against whole passes."""

import collections
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armd_scale.decoding.lanes import STRATEGIES
from armd_scale.inference import FREE, Decoding, InputError
from armd_scale.objectives import card
from armd_scale.objectives.interface import training
from tests import reference
from tests.conftest import BASELINES, standalone, tiny_distribution
from tests.objectives.test_objectives import config

V, N = 3, 4
TEXTS = list(itertools.product(range(V), repeat=N))


@given(st.integers(2, 60), st.floats(1e-9, 1 - 1e-9), st.floats(1, 4), st.integers(0, 99))
def test_a_soft_tail_masks_its_share_of_the_last_tokens(length, time, tail, key):
    masked = card.soft_tail(length, time, tail, key)
    count = max(1, math.floor(length * time))
    assert masked.sum() == count
    assert not masked[: length - min(length, math.floor(tail * count))].any()
    assert (masked == card.soft_tail(length, time, tail, key)).all()


def test_every_place_of_the_window_is_masked_alike():
    drawn = np.mean([card.soft_tail(20, 0.5, 1.5, key) for key in range(4000)], axis=0)
    assert drawn[:5].tolist() == [0.0] * 5
    assert np.abs(drawn[5:] - 10 / 15).max() < 5 * math.sqrt(2 / 9 / 4000)


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.floats(0.1, 3), st.floats(0.05, 1))
def test_weights_by_the_definition(mask, beta, decay):
    expected = []
    for n in range(len(mask)):
        cost = [mask[i] * (2 if i and mask[i - 1] else 1) for i in range(n)]
        expected.append(1 / (beta + sum(c * (1 - decay) ** (n - 1 - i) for i, c in enumerate(cost))))
    np.testing.assert_allclose(card.reweight(np.array(mask), beta, decay), expected, rtol=1e-12)


def test_the_loss_is_the_weighted_sum_over_noised_prefixes():
    """Against the slow reference: every token is predicted from the noised tokens before it alone."""
    model = standalone(BASELINES["card"])
    tokens = np.random.default_rng(0).integers(0, 50, (3, 16))
    rows = training("card").rows(config("card"), tokens, 5, [2, 5, 7])
    natural = torch.arange(1, 17)[None].expand(3, -1)
    seen = torch.cat([rows.context_tokens[:, 1:], torch.zeros(3, 1, dtype=torch.long)], dim=1)
    nll = -model.predict(model.whole(seen, natural, natural)).log_softmax(-1)
    got = nll.gather(-1, rows.target_tokens[..., None])[..., 0] * rows.weights
    for text in range(3):
        masked = (rows.context_tokens[text, 1:] == 50).tolist()
        for n in range(16):
            prefix = [50 if masked[i] else int(tokens[text, i]) for i in range(n)]
            padded, order = [*prefix, 0], range(1, n + 2)
            logp = reference.log_probabilities(model.state_dict(), model.config, padded, order, order)[n]
            weight = card.reweight(np.array([*masked[:n], False]), 1.0, 0.5)[n]
            assert float(got[text, n]) == pytest.approx(-weight * float(logp[tokens[text, n]]), rel=1e-4)


def test_a_clean_prefix_gives_a_distribution_over_texts():
    model = tiny_distribution(V, N, objective="card", two_stream_layers=0)
    assert float((-model.nll(torch.tensor(TEXTS)).sum(1)).exp().sum()) == pytest.approx(1, abs=1e-12)


def proposals(model, prefix, block):
    """Probabilities [K, V] of the tokens behind a clean prefix, each given the prefix and masks; whole passes."""
    count = min(block, N - len(prefix))
    text = torch.tensor([[*prefix, *[V] * count]])
    natural = torch.arange(1, text.shape[1] + 1)[None]
    return model.predict(model.whole(text, natural, natural))[0, len(prefix) :].softmax(-1)


def law(model, block, confidence):
    """Probability of every text under confident decoding, by enumeration of what each pass accepts."""
    out = collections.Counter()

    def write(prefix, probability):
        if len(prefix) == N:
            out[prefix] += probability
            return
        p = proposals(model, prefix, block)
        accepted = 1
        while accepted < len(p) and float(p[accepted].max()) >= confidence:
            accepted += 1
        for tokens in itertools.product(range(V), repeat=accepted):
            write((*prefix, *tokens), probability * math.prod(float(p[k, token]) for k, token in enumerate(tokens)))

    write((), 1.0)
    return out


@pytest.mark.parametrize(("block", "confidence"), [(0, 0.9), (2, 0.0), (3, 0.5), (4, 0.45), (4, 1.0)])
def test_decoding_follows_its_law(block, confidence):
    model, count = tiny_distribution(V, N, objective="card", two_stream_layers=0), 4000
    expected = law(model, max(1, block), confidence)
    assert sum(expected.values()) == pytest.approx(1)
    if block == 0 or confidence == 1.0:
        exact = (-model.nll(torch.tensor(TEXTS)).sum(1)).exp().tolist()
        assert [expected[text] for text in TEXTS] == pytest.approx(exact)
    decoding = Decoding(block=block, confidence=confidence)
    found = collections.Counter(map(tuple, model.generate(batch=count, seed=5, decoding=decoding).tolist()))
    common = [text for text in TEXTS if count * expected[text] >= 5]  # counts of rarer texts are not normal
    pairs = [(found[text], count * expected[text]) for text in common]
    pairs.append((count - sum(got for got, _ in pairs), count - sum(wanted for _, wanted in pairs)))
    statistic = sum((got - wanted) ** 2 / wanted for got, wanted in pairs)
    assert statistic < len(pairs) + 5 * math.sqrt(2 * len(pairs))


def test_the_settings_of_the_law_differ():
    """Blocks and confidences above accept different numbers of tokens: the test of the law could tell them apart."""
    model = tiny_distribution(V, N, objective="card", two_stream_layers=0)
    laws = [law(model, block, confidence) for block, confidence in ((1, 0.9), (2, 0.0), (3, 0.5), (4, 0.45))]
    assert len({tuple(round(one[text], 9) for text in TEXTS) for one in laws}) == len(laws)


@pytest.mark.parametrize("kind", ["card", "card modern"])
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 99))
def test_cached_decoding_is_that_of_whole_passes(kind, sizes, block, seed):
    """Greedy, prompts and blocks of any length side by side: each text is what whole passes over it write."""
    model = standalone(BASELINES[kind])
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(2, 50, size).tolist() for size in sizes]  # none begins with BOS
    decoding = Decoding(temperature=0, block=block, confidence=0.2)
    texts = model.generate(prompts, 12, decoding)
    for prompt, text in zip(prompts, texts, strict=True):
        written = list(prompt)
        while len(written) < 12:
            padded = torch.tensor([[*written, *[50] * min(block, 12 - len(written))]])
            natural = torch.arange(1, padded.shape[1] + 1)[None]
            p = model.predict(model.whole(padded, natural, natural))[0, len(written) :].softmax(-1)
            accepted = 1
            while accepted < len(p) and float(p[accepted].max()) >= 0.2:
                accepted += 1
            written += p[:accepted].argmax(-1).tolist()
        assert text.tolist() == written


def test_lanes_that_come_and_go():
    """A lane is used again, beside idle ones and one of another block: its text is what it is alone."""
    model = standalone(BASELINES["card"])
    rows = [[3, FREE, FREE, FREE], [FREE] * 9, [4, 5] + [FREE] * 12]
    blocks = [Decoding(block=size, confidence=0.05) for size in (2, 4, 3)]
    tasks = [model.plan([row], way, [seed])[0] for row, way, seed in zip(rows, blocks, (1, 2, 3), strict=True)]
    lanes = STRATEGIES["confident"](model, 3, 17, 8)
    lanes.admit({1: tasks[0], 2: tasks[1]})
    lanes.step()
    while not bool(lanes.finished()[1]):
        lanes.step()
    lanes.release(1)
    lanes.admit({1: tasks[2]})
    while not bool(lanes.finished().all()):
        lanes.step()
    for lane, row in ((1, 2), (2, 1)):
        [alone] = model.complete([tasks[row]])
        assert lanes.text[lane, 1 : len(rows[row]) + 1].tolist() == alone.tolist()


@pytest.mark.parametrize("decoding", [Decoding(streams=2), Decoding(draft=2), Decoding(steps=3)])
def test_other_ways_of_decoding_are_refused(decoding):
    with pytest.raises(InputError, match="block"):
        standalone(BASELINES["card"]).generate(decoding=decoding)
