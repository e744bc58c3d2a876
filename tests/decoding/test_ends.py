"""Where texts begin and end: any tokens that end a text, its least length, and BOS at the head of a prompt."""

import dataclasses

import pytest
import torch

from armd_scale.inference import FREE, Decoding, Frontier, InputError
from tests.conftest import BASELINES, MODELS, standalone

CASES = {
    "strided": ("paper", Decoding(streams=3)),
    "one by one": ("modern", Decoding()),
    "exact": ("modern", Decoding(draft=3)),
    "exact streams": ("paper", Decoding(streams=2, draft=2)),
    "ar": ("ar", Decoding()),
    "ancestral": ("mdm", Decoding(steps=5)),
    "confident": ("card", Decoding(block=3, confidence=0.02)),
}
PROMPTS = [[5, 6], [7, 8, 9], [10]]


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    """A model and a way to decode."""
    kind, decoding = request.param
    return standalone({**MODELS, **BASELINES}[kind]), decoding


def written(model, decoding, seed=4):
    """The generated tokens of each text."""
    tasks = model.plan([prompt + [FREE] * 12 for prompt in PROMPTS], decoding, seed)
    return [text.tolist()[len(task.given) :] for text, task in zip(model.complete(tasks), tasks, strict=True)]


def test_a_text_ends_at_the_first_of_its_ends(case):
    model, decoding = case
    whole = written(model, decoding)
    ends = (whole[0][4], whole[1][7])
    texts = written(model, dataclasses.replace(decoding, stop=True, stop_ids=ends))
    for text, long in zip(texts, whole, strict=True):
        first = next((place for place, token in enumerate(long) if token in ends), len(long) - 1)
        assert text == long[: first + 1]
    assert texts == written(model, dataclasses.replace(decoding, stop=True, stop_ids=ends[::-1]))


def test_the_models_eos_is_a_token_where_other_tokens_end_a_text(case):
    model, decoding = case
    whole = written(model, decoding)
    unused = next(token for token in range(50) if all(token not in text for text in whole))
    model.config = dataclasses.replace(model.config, eos_id=whole[0][2])
    assert written(model, dataclasses.replace(decoding, stop=True, stop_ids=(unused,))) == whole
    assert len(written(model, dataclasses.replace(decoding, stop=True))[0]) <= 3


def test_no_text_ends_before_its_least_length(case):
    model, decoding = case
    ends = tuple({token for text in written(model, decoding) for token in text[:6]})
    short = written(model, dataclasses.replace(decoding, stop=True, stop_ids=ends))
    assert min(map(len, short)) < 6
    texts = written(model, dataclasses.replace(decoding, stop=True, stop_ids=ends, min_tokens=6))
    for text in texts:
        assert len(text) >= 7
        assert not {*text[:6]} & {*ends}
    assert written(model, dataclasses.replace(decoding, min_tokens=6)) == written(model, decoding)


def test_the_least_length_keeps_the_distribution_of_the_other_tokens():
    """With EOS excluded, the first token is drawn from the other tokens in their proportions."""
    model = standalone(MODELS["paper"])
    scores = model.logits(torch.tensor([[5, 0]]))[0, 1].exp()
    likely = scores.argsort(descending=True)[:4].tolist()
    decoding = Decoding(stop=True, stop_ids=(likely[0],), min_tokens=1)
    tasks = model.plan([[5, FREE, FREE]] * 3000, decoding, 0)
    first = torch.stack([text[1] for text in model.complete(tasks)])
    wanted = scores.clone()
    wanted[likely[0]] = 0
    share = torch.bincount(first, minlength=50) / len(first)
    torch.testing.assert_close(share.double(), wanted / wanted.sum(), atol=0.03, rtol=0)
    assert share[likely[0]] == 0


def test_a_frontier_stops_at_any_end():
    model = standalone(MODELS["paper"])
    [task] = model.plan([[5, FREE, FREE, FREE]], Decoding(stop=True, stop_ids=(8, 9)))
    frontier = Frontier(task, model.config.eos_id)
    assert frontier.push([2, 3, 4], [model.config.eos_id, 9, 7]) == [model.config.eos_id]
    assert frontier.stopped


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"stop_ids": (50,)}, "token 50 is not in the vocabulary"),
        ({"stop_ids": (-1,)}, "stop_ids must be tokens"),
        ({"stop_ids": ("a",)}, "stop_ids must be tokens"),
        ({"min_tokens": -1}, "min_tokens must be"),
        ({"min_tokens": 1.5}, "min_tokens must be"),
    ],
)
def test_ends_that_are_not_tokens(settings, line):
    with pytest.raises(InputError, match=line):
        standalone(MODELS["paper"]).generate([5, 6], decoding=Decoding(stop=True, **settings))


@pytest.mark.parametrize("kind", ["paper", "ar", "mdm"])
def test_a_bos_at_the_head_of_a_prompt_is_the_bos_of_the_text(kind):
    model = standalone({**MODELS, **BASELINES}[kind])
    bos = model.config.bos_id
    for settings in ({"new_tokens": 5}, {"length": 9}):
        wanted = model.generate([[5, 6], [7, 8]], **settings)
        out = model.generate(torch.tensor([[bos, 5, 6], [bos, 7, 8]]), **settings)
        assert out[:, 0].tolist() == [bos, bos]
        assert torch.equal(out[:, 1:], wanted)
    mixed = model.generate([[bos, 5, 6], [7, 8]], new_tokens=5)
    assert mixed[0, 1:].tolist() == model.generate([[5, 6], [7, 8]], new_tokens=5)[0].tolist()
    assert mixed[1, :-1].tolist() == model.generate([[5, 6], [7, 8]], new_tokens=5)[1].tolist()
    assert model.generate([bos], length=4)[0, 1:].tolist() == model.generate(length=4)[0].tolist()
    longest = model.generate([bos, *range(2, 16)], length=16)
    assert longest.shape == (1, 17)
    with pytest.raises(InputError, match="there is nothing to generate"):
        model.generate([bos], new_tokens=0)


def test_a_bos_at_the_head_of_a_text_with_gaps():
    model = standalone(MODELS["paper"])
    bos = model.config.bos_id
    wanted = model.fill([5, FREE, 8, FREE], order=[4, 2])
    assert torch.equal(model.fill([bos, 5, FREE, 8, FREE], order=[4, 2])[:, 1:], wanted)
    assert model.without_bos([bos, bos, 5]) == [bos, 5]
    assert model.without_bos([5, bos]) == [5, bos]
    assert model.without_bos([]) == []
