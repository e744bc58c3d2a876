"""Decoding in lanes: caches against full passes, distributions against enumeration, and broken twins."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from armd_scale.decoding import lanes as decoding
from armd_scale.decoding import network
from armd_scale.decoding.lanes import Exact, Lockstep, Strided
from armd_scale.decoding.sampling import Sampler, draw
from armd_scale.inference import FREE, Decoding, Frontier
from tests import reference
from tests.conftest import BASELINES, MODELS, standalone, tiny_distribution

CASES = {
    "from nothing": [[FREE] * 16] * 3,
    "ragged last block": [[FREE] * 13] * 2,
    "one prompt length": [[5, 6, 7] + [FREE] * 13, [9, 9, 3] + [FREE] * 13],
    "prompts of different lengths": [[5] + [FREE] * 12, [6, 7, 8, 9, 3] + [FREE] * 11, [FREE] * 7],
    "prefix and suffix": [[5, 6] + [FREE] * 9 + [7, 8, 9]],
    "scattered": [[FREE, 4, FREE, FREE, 5, FREE, 6, FREE, FREE, FREE, 7], [FREE] * 3 + [8] + [FREE] * 4],
    "nearly given": [[5] * 15 + [FREE], [5] * 7 + [FREE] * 2],
}


@pytest.fixture
def spied(monkeypatch):
    """Logits of every call of the sampler, and the tokens of every draw."""
    seen = {"logits": [], "draws": []}
    original, drawn = Sampler.probabilities, draw

    def probabilities(self, logits):
        seen["logits"].append(logits)
        return original(self, logits)

    def note(weights, uniform):
        seen["draws"].append(drawn(weights, uniform))
        return seen["draws"][-1]

    monkeypatch.setattr(Sampler, "probabilities", probabilities)
    monkeypatch.setattr(decoding, "draw", note)
    return seen


def _texts(tasks, steps):
    """Finished texts by position, 0 is BOS."""
    texts = [[0, *one.tokens] for one in tasks]
    for step in steps:
        for text, positions, tokens in zip(texts, step.positions.tolist(), step.tokens.tolist(), strict=True):
            for position, token in zip(positions, tokens, strict=True):
                if position:
                    assert text[position] == FREE  # written once
                    text[position] = token
    assert not any(FREE in text for text in texts)
    return texts


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("lockstep", "streams"), [*((True, s) for s in (1, 2, 4, 8, 16)), *((False, s) for s in (1, 4, 16))]
)
@pytest.mark.parametrize("case", CASES)
def test_cached_steps_equal_one_pass(kind, streams, case, lockstep, spied, monkeypatch):
    """The logits of every step are those of one pass over the finished text, in the same layout."""
    model = standalone(MODELS[kind])
    tasks = model.plan(CASES[case], Decoding(streams=streams), seed=4)
    in_step, original = [], Lockstep.step
    monkeypatch.setattr(Lockstep, "step", lambda self: in_step.append(1) or original(self))
    if lockstep:
        steps = list(model.decode(tasks))
        assert bool(in_step) == (len({(tuple(one.order), len(one.tokens)) for one in tasks}) == 1)
    else:
        steps = _lanes(model, Strided, tasks, streams)
    texts = _texts(tasks, steps)
    assert len(spied["logits"]) == len(steps) == max(len(one.blocks) for one in tasks)
    for row, (one, text) in enumerate(zip(tasks, texts, strict=True)):
        free = len(one.order)
        width = min(streams, free)
        assert len(one.blocks) == width + math.ceil(free / width) - 1
        order = [*one.given, *one.order]
        ids = [*range(1, len(one.given) + 1)]
        ids += [len(one.given) + number for number, block in enumerate(one.blocks, 1) for _ in block]
        expected = model.logits(torch.tensor([text[1:]]), torch.tensor(order), torch.tensor(ids))[0]
        for block, step, logits in zip(one.blocks, steps, spied["logits"], strict=False):
            assert step.positions[row, : len(block)].tolist() == block
            torch.testing.assert_close(logits[row, : len(block)], expected[[p - 1 for p in block]], atol=1e-10, rtol=0)


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("kind", [*MODELS, "ar", "ar modern"])
def test_prompts_may_pass_in_parts(kind, lockstep, spied, monkeypatch):
    """Prompts of which a few tokens at a time pass through the network leave the same in the cache."""
    config = {**MODELS, **BASELINES}[kind]
    model, cases = standalone(config), CASES
    if not config.traits.any_order:
        cases = {name: case for name, case in CASES.items() if "prompt" in name}
    for case in cases.values():
        tasks, found = model.plan(case, Decoding(), seed=4), []
        for rows in (1024, 2, 3):
            monkeypatch.setattr(network, "ROWS", rows)
            spied["logits"].clear()
            steps = list(model.decode(tasks)) if lockstep else _lanes(model, Strided, tasks, 1)
            found.append((_texts(tasks, steps), torch.stack(spied["logits"])))
        for texts, logits in found[1:]:
            assert texts == found[0][0]
            # lanes that have ended go on with what is left in them
            last = [len(one.blocks) for one in tasks]
            for row, count in enumerate(last):
                torch.testing.assert_close(logits[:count, row], found[0][1][:count, row], atol=1e-10, rtol=0)


@torch.no_grad()
def _lanes(model, strategy, tasks, width):
    lanes = strategy(model, len(tasks), max(len(one.tokens) for one in tasks) + 1, width)
    lanes.admit(dict(enumerate(tasks)))
    steps = []
    while not bool(lanes.finished().all()):
        steps.append(lanes.step())
    return steps


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", [Decoding(draft=2), Decoding(draft=5), Decoding(draft=4, streams=4)])
@pytest.mark.parametrize("case", CASES)
def test_cached_scores_and_drafts_equal_one_pass(kind, way, case, spied):
    """In exact parallel decoding a score is the next token's distribution behind the draft before it. The next draft is
    drawn from the draft rows behind the accepted tokens, or in several streams from such scores.
    """
    model = standalone(MODELS[kind])
    tasks = model.plan(CASES[case], way, seed=4)
    steps = list(model.decode(tasks))
    texts = _texts(tasks, steps)
    for row, (one, text) in enumerate(zip(tasks, texts, strict=True)):
        written = 0
        for number, step in enumerate(steps):
            logits, drafted = (spied["logits"][2 * number + part][row] for part in (0, 1))
            drawn = spied["draws"][2 * number][row].tolist()
            known = [*one.given, *one.order[:written]]
            ahead = one.order[written : written + way.draft] if number else []
            for place, target in enumerate(one.order[written : written + way.draft + 1]):
                seen = ahead[:place]
                tokens = [*(text[p] for p in known), *drawn[: len(seen)]]
                expected = _next(model, tokens, [*known, *seen], target)
                torch.testing.assert_close(logits[place], expected, atol=1e-10, rtol=0)
            count = int((step.positions[row] > 0).sum())
            assert step.positions[row].tolist()[:count] == one.order[written : written + count]
            assert min(1, len(one.order) - written) <= count <= len(ahead) + 1
            kept = ahead[: count - 1]
            assert [text[p] for p in kept] == drawn[: len(kept)]
            following = one.order[written + count : written + count + way.draft]
            for place, target in enumerate(following):
                behind = ahead[: len(kept) + 1 + place] if way.streams > 1 else kept
                tokens = [*(text[p] for p in known), *drawn[: len(behind)]]
                if way.streams > 1:
                    expected = _next(model, tokens, [*known, *behind], target)
                else:
                    expected = _ahead(model, tokens, [*known, *kept], one.order[written + len(kept)], target)
                torch.testing.assert_close(drafted[place], expected, atol=1e-10, rtol=0)
            written += count
        assert written == len(one.order)


@torch.no_grad()
def _next(model, tokens, at, target):
    """Logits of position ``target`` behind tokens at other positions, one a block, in one pass."""
    rows = torch.tensor([[*tokens, 0]])
    positions = torch.tensor([[*at, target]])
    return model.predict(model.whole(rows, positions, torch.arange(1, rows.shape[1] + 1)[None]))[0, -1]


@torch.no_grad()
def _ahead(model, tokens, at, following, target):
    """Logits of a draft row that knows tokens at other positions, of which ``following`` is next, in one pass."""
    positions = torch.tensor([[*at, following]])
    blocks = torch.arange(1, positions.shape[1] + 1)[None]
    h = model.whole(torch.tensor([[*tokens, 0]]), positions, blocks, torch.full_like(positions, target))
    return model.predict(h)[0, -1]


TWELVE = torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize(
    ("given_at", "targets"),
    [
        pytest.param([1, 2, 3], [7], id="ahead"),
        pytest.param([12, 5], [6, 4, 1], id="in-between"),
        pytest.param([], [9, 2], id="nothing-given"),
        pytest.param(list(range(2, 13)), [1], id="all-others-given"),
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_conditional_nll_equals_the_reference(kind, given_at, targets):
    """Any part of a text given any other; what is in neither does not matter."""
    model = standalone(MODELS[kind])
    got = model.conditional_nll(TWELVE, targets, given_at)[0]
    order = [*sorted(given_at), *targets]
    expected = reference.log_probabilities(
        model.state_dict(), model.config, TWELVE, order, list(range(1, len(order) + 1))
    )
    for place, target in enumerate(targets):
        wanted = -float(expected[len(given_at) + place, TWELVE[target - 1]])
        assert float(got[place]) == pytest.approx(wanted, abs=2e-5)
    changed = [t if p in order else FREE for p, t in enumerate(TWELVE, start=1)]
    assert torch.equal(got, model.conditional_nll(changed, targets, given_at)[0])


@pytest.mark.parametrize("kind", MODELS)
def test_conditional_nll_of_a_whole_text_is_its_nll(kind):
    model = standalone(MODELS[kind])
    whole = float(model.nll(torch.tensor([TWELVE])).sum())
    assert float(model.conditional_nll(TWELVE, range(1, 13)).sum()) == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", [Decoding(), Decoding(streams=4, top_p=0.9), Decoding(streams=2, draft=3)])
def test_a_sequence_does_not_depend_on_its_batch(way, dtype):
    """Neighbours of other lengths change nothing, nor do rows that come and go."""
    model = standalone(MODELS["paper"]).to(dtype)
    prompts = [[3, 4, 5], [6], [], [7, 8, 9, 10, 11, 12], [3, 4, 5]]
    together = model.generate(prompts, new_tokens=9, decoding=way, seed=[11, 12, 13, 14, 15])
    for row, prompt in enumerate(prompts):
        alone = model.generate([prompt], new_tokens=9, decoding=way, seed=[11 + row])[0]
        assert torch.equal(together[row, : len(alone)], alone)
    assert not torch.equal(together[0, 3:12], together[4, 3:12])


@given(st.sampled_from(list(MODELS)), st.sampled_from([Strided, Exact]), st.integers(0, 10**6))
@settings(max_examples=25)
def test_lanes_that_come_and_go(kind, strategy, seed):
    """Continuous batching: a text admitted at any time, into any lane, is the text decoded alone."""
    model, random = standalone(MODELS[kind]), np.random.default_rng(seed)
    waiting = []
    for number in range(int(random.integers(1, 7))):
        way = Decoding(
            streams=int(random.integers(1, 5)),
            draft=int(random.integers(2, 5)) if strategy is Exact else 0,
            temperature=float(random.choice([0.0, 0.7, 1.0])),
            top_k=int(random.choice([0, 3])),
            stop=bool(random.integers(2)),
        )
        text = random.choice([FREE, FREE, 7, 9], int(random.integers(1, 17))).tolist()
        waiting += model.plan([text], way, seed=[number])
    expected = [model.complete([one])[0].tolist() for one in waiting]
    lanes = strategy(model, 3, 17, 4)
    lanes.release(0)
    queue, running, done = list(enumerate(waiting)), {}, {}
    with torch.no_grad():
        while queue or running:
            for lane in range(3):
                if lane not in running and queue and random.random() < 0.4:
                    number, one = queue.pop(0)
                    running[lane] = number, Frontier(one, model.config.eos_id)
                    lanes.admit({lane: one})
            if running:
                step = lanes.step()
            for lane, (number, frontier) in list(running.items()):
                frontier.push(step.positions[lane].tolist(), step.tokens[lane].tolist())
                if frontier.ended:
                    assert bool(lanes.finished()[lane])
                    done[number] = frontier.tokens[: frontier.passed]
                    lanes.release(lane)
                    del running[lane]
                else:
                    assert not bool(lanes.finished()[lane])
    assert [done[number] for number in range(len(waiting))] == expected


def test_seeds():
    model = standalone(MODELS["paper"])
    way = Decoding(streams=2)
    first = model.generate(seed=1, batch=4, decoding=way)
    assert torch.equal(first, model.generate(seed=1, batch=4, decoding=way))
    assert not torch.equal(first, model.generate(seed=2, batch=4, decoding=way))
    assert len({tuple(row) for row in first.tolist()}) == 4
    assert torch.equal(first[:1], model.generate(seed=[1], decoding=way))


@pytest.mark.parametrize("way", [Decoding(temperature=0), Decoding(temperature=0, draft=4)])
def test_temperature_zero_takes_the_likeliest_token(way):
    model = standalone(MODELS["paper"])
    text = model.generate(batch=2, decoding=way)
    assert torch.equal(text, model.logits(text).argmax(-1))


@pytest.mark.parametrize("way", [{}, {"streams": 4}, {"draft": 3}, {"streams": 2, "draft": 4}])
def test_a_text_stops_at_its_first_eos_by_position(way):
    """Streams have a fixed length: what they wrote behind the first EOS is left out, and nothing before it changes."""
    model = standalone(MODELS["paper"])
    model.embedding.weight[2] *= 3  # EOS becomes a likely token
    prompts = [[2, 5], [7], [9, 9, 9], [4]] * 4
    fixed = model.generate(prompts, length=16, decoding=Decoding(**way), seed=range(16))
    stopped = model.generate(prompts, length=16, decoding=Decoding(stop=True, **way), seed=range(16))
    ends = 0
    for prompt, whole, short in zip(prompts, fixed.tolist(), stopped.tolist(), strict=True):
        end = next((p for p in range(len(prompt), 16) if whole[p] == 2), 16)
        assert short == whole[: end + 1] + [2] * (15 - end)
        ends += end < 15
    assert ends >= 3
    tasks = model.plan([[9] + [FREE] * 15], Decoding(stop=True, **way), seed=[1])
    [text] = model.complete(tasks)
    assert (text[1:-1] != 2).all()


@pytest.mark.parametrize("streams", [1, 4])
def test_decoding_ends_when_the_texts_have(monkeypatch, streams):
    """No step is made once everything before the first EOS is there."""
    model = standalone(MODELS["paper"])
    ends = torch.zeros(50, dtype=torch.float64)
    ends[2] = 1.0
    monkeypatch.setattr(Sampler, "probabilities", lambda self, logits: ends.expand(logits.shape))
    tasks = model.plan([[FREE] * 16] * 2, Decoding(streams=streams, stop=True))
    assert len(list(model.decode(tasks))) == 1


@given(st.data())
def test_tokens_are_given_out_by_position(data):
    """Streaming: whatever the order of arrival, each complete position is given out once, in order."""
    tokens = data.draw(st.lists(st.sampled_from([FREE, FREE, 2, 7]), min_size=1, max_size=12))
    model = tiny_distribution(8, 12, eos_id=2)
    [one] = model.plan([tokens], Decoding(stop=data.draw(st.booleans())))
    written = {p: data.draw(st.integers(0, 7)) for p in one.order}
    frontier, out = Frontier(one, 2), []
    arrival = data.draw(st.permutations(one.order))
    for position in arrival:
        complete = [p for p in one.order if all(q in arrival[: arrival.index(position)] for q in one.order if q <= p)]
        assert len(out) <= len(complete)
        out += frontier.push([position, 0], [written[position], 3])
    expected = [written[p] for p in one.order]
    if one.decoding.stop and 2 in expected:
        expected = expected[: expected.index(2)]
    assert out == expected
    assert frontier.ended


def _every_text(vocab, tokens):
    """All texts that agree with what is given."""
    options = [range(vocab) if token == FREE else [token] for token in tokens]
    return torch.tensor(list(itertools.product(*options)))


def _p_value(model, tokens, way, probabilities, samples=8_000, order=None):
    """Chi-square of sampled texts against the probabilities of every text."""
    every = _every_text(model.config.vocab_size, tokens)
    weights = model.config.vocab_size ** torch.arange(len(tokens))
    code = (every * weights).sum(1)
    place = {int(number): index for index, number in enumerate(code)}
    observed = np.zeros(len(every))
    for seed in range(4):
        tasks = model.plan([tokens] * (samples // 4), way, seed, order)
        for number, count in zip(
            *np.unique((torch.stack(model.complete(tasks)) * weights).sum(1).numpy(), return_counts=True), strict=True
        ):
            observed[place[int(number)]] += count
    expected = probabilities(every).numpy() * samples
    assert expected.sum() == pytest.approx(samples)
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    return chisquare(observed, expected).pvalue


def _law(model, tokens, blocks):
    """Probability of every text by the blocks in which its free positions are generated."""
    known = [p for p, token in enumerate(tokens, 1) if token != FREE]
    order = torch.tensor([*known, *(p for block in blocks for p in block)])
    ids = [*range(1, len(known) + 1), *(len(known) + n for n, block in enumerate(blocks, 1) for _ in block)]

    def probabilities(texts):
        nll = model.nll(texts, order, torch.tensor(ids))
        return (-nll[:, order[len(known) :] - 1].sum(1)).exp()

    return probabilities


LAWS = {
    "one stream": ([FREE] * 4, {}, None, [[1], [2], [3], [4]]),
    "two streams": ([FREE] * 4, {"streams": 2}, None, [[1], [3], [2, 4]]),
    "exact, drafts of 1": ([FREE] * 4, {"draft": 1}, None, [[1], [2], [3], [4]]),
    "exact, drafts of 2": ([FREE] * 4, {"draft": 2}, None, [[1], [2], [3], [4]]),
    "exact, drafts of 3": ([FREE] * 4, {"draft": 3}, None, [[1], [2], [3], [4]]),
    "exact, drafts of 8": ([FREE] * 4, {"draft": 8}, None, [[1], [2], [3], [4]]),
    "exact, two streams": ([FREE] * 4, {"draft": 3, "streams": 2}, None, [[1], [3], [2], [4]]),
    "infilling": ([FREE, 1, FREE, FREE, 0], {}, None, [[1], [3], [4]]),
    "infilling in an order": ([FREE, 1, FREE, FREE, 0], {}, [4, 1, 3], [[4], [1], [3]]),
    "exact infilling": ([FREE, 1, FREE, FREE, 0, FREE], {"draft": 3}, [6, 1, 4, 3], [[6], [1], [4], [3]]),
}


@pytest.mark.parametrize("name", LAWS)
def test_texts_come_as_often_as_their_probabilities_say(name):
    tokens, way, order, blocks = LAWS[name]
    model = tiny_distribution(3, 6)
    assert _p_value(model, tokens, Decoding(**way), _law(model, tokens, blocks), order=order) > 1e-3


def test_the_ways_differ():
    """The test has teeth: two streams, and another order, are other distributions."""
    model = tiny_distribution(3, 6)
    one = _law(model, [FREE] * 4, [[1], [2], [3], [4]])
    assert _p_value(model, [FREE] * 4, Decoding(streams=2), one) < 1e-6
    tokens = [FREE, 1, FREE, FREE, 0]
    assert _p_value(model, tokens, Decoding(), _law(model, tokens, [[4], [1], [3]])) < 1e-6


BROKEN = {
    "squeezed numbers": ({}, lambda patch: _wrap(patch, "uniform", lambda out: out * 0.9)),
    "the same numbers for all texts": ({}, lambda patch: patch(decoding, "uniform", lambda key, *shape: _same(shape))),
    "strided: squeezed numbers": ({"streams": 2}, lambda patch: _wrap(patch, "uniform", lambda out: out * 0.9)),
    "exact: every draft is kept": (
        {"draft": 3},
        lambda patch: patch(decoding, "accept", lambda p, q, u: torch.ones_like(p).bool()),
    ),
    "exact: too many are kept": (
        {"draft": 3},
        lambda patch: patch(decoding, "accept", lambda p, q, u: u * p < 1.3 * q),
    ),
    "exact: refused tokens are drawn from the score": (
        {"draft": 3},
        lambda patch: patch(Exact, "_rest", staticmethod(lambda fresh, old, refused: fresh)),
    ),
}


def _wrap(patch, name, change):
    original = getattr(decoding, name)
    patch(decoding, name, lambda *arguments: change(original(*arguments)))


def _same(shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_twins_are_caught(name, monkeypatch):
    way, breaks = BROKEN[name]
    breaks(monkeypatch.setattr)
    model = tiny_distribution(3, 6)
    blocks = [[1], [3], [2, 4]] if way.get("streams") else [[1], [2], [3], [4]]
    assert _p_value(model, [FREE] * 4, Decoding(**way), _law(model, [FREE] * 4, blocks)) < 1e-6


def test_a_broken_infilling_is_caught(monkeypatch):
    """Infilling that does not see what is given behind the gap."""
    model = tiny_distribution(3, 6)
    tokens = [FREE, FREE, 1, FREE, 0]
    law = _law(model, tokens, [[1], [2], [4]])
    assert _p_value(model, tokens, Decoding(), law) > 1e-3
    blind = [FREE, FREE, 0, FREE, 2]
    original = type(model).complete

    def complete(self, tasks):
        texts = original(self, self.plan([blind] * len(tasks), seed=[hash(one.key) % 2**31 for one in tasks]))
        return [text.index_copy(0, torch.tensor([2, 4]), torch.tensor([1, 0])) for text in texts]

    monkeypatch.setattr(type(model), "complete", complete)
    assert _p_value(model, tokens, Decoding(), law) < 1e-6


class _Choices:
    """Plays every choice of a program in turn: a path of choices, and the probability of having taken it."""

    def __init__(self):
        self.path, self.at, self.weight = [], 0, 1.0

    def start(self):
        self.at, self.weight = 0, 1.0

    def choose(self, probabilities):
        options = [index for index, p in enumerate(probabilities) if p > 0]
        if self.at == len(self.path):
            self.path.append([options, 0])
        kept, place = self.path[self.at]
        assert kept == options
        self.at += 1
        self.weight *= float(probabilities[options[place]])
        return options[place]

    def advance(self):
        """Go to the next path; False when there is none."""
        while self.path and self.path[-1][1] + 1 == len(self.path[-1][0]):
            self.path.pop()
        if self.path:
            self.path[-1][1] += 1
        return bool(self.path)


@pytest.mark.parametrize(
    ("vocab", "length", "draft", "order"), [(2, 3, 2, None), (2, 3, 3, [3, 1, 2]), (3, 2, 2, None)]
)
@pytest.mark.parametrize("broken", [False, True])
def test_exact_parallel_decoding_by_enumeration(vocab, length, draft, order, broken, monkeypatch):
    """Every outcome of every draw and every refusal, with its probability: their sum is the one-token-a-step law."""
    model = tiny_distribution(vocab, length)
    choices = _Choices()

    def choose_token(weights, uniform):
        # A draft that is not there has no weights, and nothing is chosen.
        return torch.tensor([[choices.choose((row / row.sum()).tolist()) if row.any() else 0 for row in weights[0]]])

    def choose_refusal(p, q, uniform):
        kept = [min(1.0, float(b / a)) if a and not broken else 1.0 for a, b in zip(p[0], q[0], strict=True)]
        return torch.tensor([[bool(choices.choose([1 - one, one])) for one in kept]])

    monkeypatch.setattr(decoding, "draw", choose_token)
    monkeypatch.setattr(decoding, "accept", choose_refusal)
    found: dict[tuple[int, ...], float] = {}
    [one] = model.plan([[FREE] * length], Decoding(draft=draft), order=order)
    runs, more = 0, True
    while more:
        choices.start()
        text = tuple(model.complete([one])[0].tolist())
        found[text] = found.get(text, 0.0) + choices.weight
        runs += 1
        more = choices.advance()
    assert runs >= vocab**length
    every = _every_text(vocab, [FREE] * length)
    law = _law(model, [FREE] * length, [[p] for p in order or range(1, length + 1)])(every)
    difference = max(abs(found[tuple(text.tolist())] - float(p)) for text, p in zip(every, law, strict=True))
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    assert (difference < 1e-12) != broken


def test_drafts_that_agree_are_kept():
    """A model whose tokens do not depend on each other: all of every draft is kept, k + 1 tokens a pass."""
    model = tiny_distribution(5, 12)
    for name, weight in model.named_parameters():
        if "output" in name or "down" in name or "embedding" in name:
            weight.zero_()
    steps = list(model.decode(model.plan([[FREE] * 12], Decoding(draft=4))))
    assert [int((step.positions > 0).sum()) for step in steps] == [1, 5, 5, 1]


@pytest.mark.parametrize("way", [Decoding(), Decoding(streams=4)])
def test_bfloat16(way, spied):
    """Cached steps give bfloat16's logits of one pass over the text, within its rounding; draws are float32."""
    model = standalone(MODELS["modern"]).bfloat16()
    tasks = model.plan([[5, 6] + [FREE] * 14, [7] + [FREE] * 12], way, seed=2)
    texts = _texts(tasks, list(model.decode(tasks)))
    for row, (one, text) in enumerate(zip(tasks, texts, strict=True)):
        given = len(one.given)
        ids = [*range(1, given + 1), *(given + n for n, block in enumerate(one.blocks, 1) for _ in block)]
        order = torch.tensor([*one.given, *one.order])
        expected = model.logits(torch.tensor([text[1:]]), order, torch.tensor(ids))[0].float()
        for block, logits in zip(one.blocks, spied["logits"], strict=False):
            assert logits.dtype == torch.bfloat16
            got, wanted = logits[row, : len(block)].float(), expected[[p - 1 for p in block]]
            assert (got - wanted).abs().mean() < 0.02 * wanted.abs().mean()
    assert Sampler(2, torch.device("cpu")).probabilities(spied["logits"][0]).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("way", [Decoding(), Decoding(streams=4), Decoding(streams=2, draft=3)])
def test_cuda_graphs_give_the_text_of_the_cpu(way):
    """Also when texts with other settings enter after a graph was recorded."""
    model = standalone(MODELS["modern"])
    prompts = [[3, 4, 5], [6], [7, 8, 9, 10]]
    expected = model.generate(prompts, length=16, decoding=way, seed=3)
    [late] = model.plan([[5, FREE, FREE, 9, FREE, FREE, FREE]], replace(way, top_k=5, temperature=0.7), seed=[8])
    alone = model.complete([late])[0]
    model.to("cuda")
    assert torch.equal(model.generate(prompts, length=16, decoding=way, seed=3).cpu(), expected)
    tasks = model.plan([[3] + [FREE] * 15, [4] + [FREE] * 15], way, seed=4)
    with torch.no_grad():
        lanes = (Exact if way.draft else Strided)(model, 2, 17, 4)
        lanes.admit(dict(enumerate(tasks)))
        for _ in range(4):
            lanes.step()
        lanes.admit({1: late})
        while not bool(lanes.finished().all()):
            lanes.step()
    assert torch.equal(lanes.text[1, 1:8].cpu(), alone.cpu())
    assert torch.equal(lanes.text[0, 1:17], model.complete(tasks[:1])[0])
