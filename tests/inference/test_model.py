"""The standalone model against the dense float64 reference, and the identities of the design."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armd_scale import inference, orders
from armd_scale.decoding import network
from armd_scale.inference import FREE, Decoding, InputError
from tests import reference
from tests.conftest import BASELINES, MODELS, layouts, standalone, tiny_distribution


def _tensors(layout):
    return torch.from_numpy(np.array(layout.order)), torch.from_numpy(np.array(layout.block_ids))


def _random_tokens(batch, length, vocab, seed=0):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("length", [16, 13])
def test_equals_the_reference_in_every_layout(kind, length):
    model = standalone(MODELS[kind])
    tokens = _random_tokens(1, length, model.config.vocab_size)
    for name, layout in layouts(length).items():
        order, blocks = _tensors(layout)
        expected = reference.log_probabilities(
            model.state_dict(), model.config, tokens[0].tolist(), order.tolist(), blocks.tolist()
        )
        got = model.logits(tokens, order, blocks).log_softmax(-1)[0, order - 1]
        # rotary tables and sinusoids are float32 in the model
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0, msg=name)
        nll = model.nll(tokens, order, blocks)[0, order - 1]
        torch.testing.assert_close(nll, -expected.gather(1, tokens[0, order - 1][:, None])[:, 0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", [*MODELS, "ar", "card"])
def test_long_texts_pass_in_parts(kind, monkeypatch):
    """One token a block, in any order: what rows before have left in the cache is what they are in one pass."""
    config = {**MODELS, **BASELINES}[kind]
    model, tokens = standalone(config), _random_tokens(3, 16, 40)
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(n)) + 1 for n in range(3)])
    order = order if config.traits.any_order else None
    expected = model.nll(tokens, order)
    for rows in (1, 5):
        monkeypatch.setattr(network, "ROWS", rows)
        torch.testing.assert_close(model.nll(tokens, order), expected, atol=1e-10, rtol=0)


@given(st.data())
def test_strict_causality_is_exact(data):
    """Strict causality: a token of a block >= B(n) does not change the output at n by a single bit."""
    length = data.draw(st.integers(2, 16))
    model = standalone(MODELS[data.draw(st.sampled_from(list(MODELS)))])
    order = torch.tensor(data.draw(st.permutations(range(1, length + 1))))
    blocks = torch.tensor(data.draw(st.lists(st.integers(1, 5), min_size=length, max_size=length))).sort().values
    tokens = _random_tokens(1, length, model.config.vocab_size, data.draw(st.integers(0, 99)))
    changed_index = data.draw(st.integers(0, length - 1))
    changed = tokens.clone()
    position = int(order[changed_index]) - 1
    changed[0, position] = (changed[0, position] + 1) % model.config.vocab_size
    before, after = (model.logits(t, order, blocks)[0, order - 1] for t in (tokens, changed))
    blind = blocks <= blocks[changed_index]
    assert torch.equal(before[blind], after[blind])
    assert bool((before[~blind] != after[~blind]).any(-1).all())  # and every later target does see it


def test_gradients_of_hidden_tokens_are_exactly_zero():
    """Strict causality, by derivatives with respect to the embedding of each context token."""
    model = standalone(MODELS["paper"])
    tokens = torch.arange(3, 15)[None]  # all different, so a row of the embedding is a position
    for layout in layouts(12).values():
        order, blocks = _tensors(layout)
        weight = model.embedding.weight.detach().clone()

        def activations(rows, order=order, blocks=blocks):
            model.embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
            model.embedding._parameters["weight"] = rows
            return model.whole(tokens[:, order - 1], order[None], blocks[None])[0].sum(-1)

        jacobian = torch.autograd.functional.jacobian(activations, weight)[:, 3:15].abs().sum(-1)
        model.embedding._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
        for n in range(12):
            sees = {int(order[i]) for i in range(12) if blocks[i] < blocks[n]}
            for position in range(1, 13):
                assert (jacobian[n, position - 1] > 0) == (position in sees)


@given(st.integers(0, 10**6))
def test_equivariance(seed):
    """Swapping tokens of one block, with their positions, changes nothing but the order of the outputs."""
    generator = np.random.default_rng(seed)
    model, length = standalone(MODELS["paper"]), 12
    order = generator.permutation(length) + 1
    blocks = np.sort(generator.integers(1, 5, length))
    within = np.lexsort((generator.random(length), blocks))  # shuffles inside blocks only
    tokens = _random_tokens(1, length, model.config.vocab_size, seed)
    plain = model.nll(tokens, torch.from_numpy(order), torch.from_numpy(blocks))
    swapped = model.nll(tokens, torch.from_numpy(order[within]), torch.from_numpy(blocks))
    torch.testing.assert_close(plain, swapped, atol=1e-12, rtol=0)


@pytest.mark.parametrize("layout", ["left-to-right", "random", "strided-2", "random-blocks"])
def test_probabilities_of_all_texts_sum_to_one(layout):
    """The probabilities of all texts sum to 1."""
    model, length, vocab = tiny_distribution(3, 5), 5, 3
    order, blocks = _tensors(layouts(length)[layout])
    texts = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
    total = (-model.nll(texts, order, blocks).sum(1)).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-10)


def test_left_to_right_is_the_product_of_its_steps():
    """An exact likelihood: token n scored in the whole text and at the end of a text that stops there."""
    model = standalone(MODELS["modern"])
    tokens = _random_tokens(3, 16, 50)
    whole = model.nll(tokens)
    for n in range(1, 17):
        torch.testing.assert_close(whole[:, n - 1], model.nll(tokens[:, :n])[:, -1], atol=1e-10, rtol=0)


@given(st.integers(0, 12), st.integers(1, 20), st.integers(1, 24))
def test_strided_blocks_are_the_training_layout(start, count, streams):
    blocks = inference.strided_blocks(range(start + 1, start + count + 1), streams)
    layout = orders.strided(count, streams)
    assert [p - start for block in blocks for p in block] == layout.order.tolist()
    assert [b for b, block in enumerate(blocks, 1) for _ in block] == layout.block_ids.tolist()


OK = torch.zeros(1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        pytest.param(
            lambda model: model.nll(torch.zeros(1, 17, dtype=torch.long)), "does not fit this model", id="long-text"
        ),
        pytest.param(
            lambda model: model.nll(torch.zeros(1, 0, dtype=torch.long)), "does not fit this model", id="empty-text"
        ),
        pytest.param(lambda model: model.nll(OK + 50), "token 50 .* vocabulary of 50", id="large-token"),
        pytest.param(lambda model: model.nll(OK - 1), "token -1 is not", id="negative-token"),
        pytest.param(lambda model: model.nll(OK.float()), "whole numbers", id="tokens-of-floats"),
        pytest.param(
            lambda model: model.nll(OK, torch.tensor([1, 1, 2, 3])), "permutation of 1..4", id="order-with-repeats"
        ),
        pytest.param(lambda model: model.nll(OK, torch.tensor([0, 1, 2, 3])), "permutation of 1..4", id="order-from-0"),
        pytest.param(lambda model: model.nll(OK, torch.tensor([1, 2, 3])), "order must be", id="short-order"),
        pytest.param(
            lambda model: model.nll(OK, None, torch.tensor([1, 3, 2, 4])), "never decrease", id="blocks-that-fall"
        ),
        pytest.param(lambda model: model.nll(OK, None, torch.tensor([0, 1, 2, 4])), "start at 1", id="blocks-from-0"),
        pytest.param(
            lambda model: model.generate(torch.zeros(1, 17, dtype=torch.long)), "17 tokens", id="generate-long-prompt"
        ),
        pytest.param(
            lambda model: model.generate([4, 2, 3], length=2), "prompt has 3 tokens", id="generate-shorter-than-prompt"
        ),
        pytest.param(lambda model: model.generate(length=17), "length 17 does not fit", id="generate-too-long"),
        pytest.param(lambda model: model.generate(length=0), "length 0 does not fit", id="generate-nothing"),
        pytest.param(
            lambda model: model.generate([1, 2], length=8, new_tokens=3),
            "length or new_tokens",
            id="generate-two-lengths",
        ),
        pytest.param(lambda model: model.generate([4, 2], new_tokens=15), "15 new", id="generate-too-many-new"),
        pytest.param(
            lambda model: model.generate([1, 2], new_tokens=-1), "new_tokens must be", id="generate-negative-new"
        ),
        pytest.param(lambda model: model.generate(batch=0), "nothing to generate", id="generate-no-texts"),
        pytest.param(lambda model: model.generate([1, 50]), "token 50 ", id="generate-large-token"),
        pytest.param(lambda model: model.generate([1, FREE]), "token -1 ", id="generate-free-token"),
        pytest.param(lambda model: model.generate("text"), "texts must be", id="generate-string"),
        pytest.param(lambda model: model.generate([1.5]), "texts must be", id="generate-floats"),
        pytest.param(lambda model: model.generate([[1], 2]), "texts must be", id="generate-ragged-nesting"),
        pytest.param(
            lambda model: model.generate(seed=[1, 2], batch=3), "2 seeds for 3", id="generate-two-seeds-for-three"
        ),
        pytest.param(lambda model: model.generate(seed=1.5), "seed must be", id="generate-float-seed"),
        pytest.param(lambda model: model.generate(seed=None), "seed must be", id="generate-no-seed"),
        pytest.param(lambda model: model.fill([1, -2, 3]), "token -2 ", id="fill-negative-token"),
        pytest.param(lambda model: model.fill([FREE] * 17), "17 tokens", id="fill-long-text"),
        pytest.param(
            lambda model: model.fill([1, FREE, FREE], order=[2, 2]), "2 free positions", id="fill-order-with-repeats"
        ),
        pytest.param(
            lambda model: model.fill([4, FREE, FREE], order=[1, 2]), "2 free positions", id="fill-order-of-given"
        ),
        pytest.param(
            lambda model: model.fill([1, FREE, FREE], Decoding(streams=2), order=[3, 2]),
            "streams",
            id="fill-order-with-streams",
        ),
        pytest.param(lambda model: model.conditional_nll([1, 2, 3], []), "target", id="conditional-no-target"),
        pytest.param(
            lambda model: model.conditional_nll([1, 2, 3], [1, 4]), "from 1 to 3", id="conditional-target-beyond"
        ),
        pytest.param(
            lambda model: model.conditional_nll([1, 2, 3], [1], given=[1]), "from 1 to 3", id="conditional-target-given"
        ),
        pytest.param(
            lambda model: model.conditional_nll([[1, 2], [3]], [1]), "of one length", id="conditional-lengths"
        ),
        pytest.param(
            lambda model: model.conditional_nll([1, FREE, 3], [2], given=[1]),
            "targets and given",
            id="conditional-free-token",
        ),
    ],
)
def test_bad_input_is_one_line(call, line):
    with pytest.raises(InputError, match=line):
        call(standalone(MODELS["paper"]))


BAD_SETTINGS = {
    "streams": (0, -1, 1.0, True),
    "draft": (-1, 17, 2.0),
    "temperature": (-1.0, float("nan"), float("inf"), "hot"),
    "top_k": (-1, 1.5),
    "top_p": (0, 1.1, float("nan")),
    "min_p": (-0.1, 1.1),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, row in BAD_SETTINGS.items() for value in row])
def test_bad_settings_are_one_line(field, value):
    with pytest.raises(InputError, match=f"{field} must be"):
        Decoding(**{field: value})


def test_the_package_imports_neither_megatron_nor_deepspeed():
    code = "import sys, armd_scale.inference; print(sorted({m.split('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch" in out
    for name in ("megatron", "deepspeed", "transformers", "wandb", "submitit", "pydantic"):
        assert f"'{name}'" not in out


@pytest.mark.parametrize("kind", MODELS)
def test_acceptance_is_the_overlap_of_two_laws(kind):
    """Of a draft row and of one token a block, by the reference."""
    model, lags = standalone(MODELS[kind]), 2
    tokens = _random_tokens(2, 9, model.config.vocab_size)
    found = model.acceptance(tokens, lags)
    assert found.shape == (lags, 2, 9 - lags)
    order = list(range(1, 10))
    for row, text in enumerate(tokens.tolist()):
        inputs = model.state_dict(), model.config, text, order, order
        judged = reference.log_probabilities(*inputs).exp()
        for lag in range(1, lags + 1):
            drafts = [(n, n + lag + 1) for n in range(9 - lags)]
            ahead = reference.log_probabilities(*inputs, drafts).exp()
            expected = torch.minimum(judged[lag : lag + len(drafts)], ahead).sum(-1)
            torch.testing.assert_close(found[lag - 1, row], expected, atol=2e-5, rtol=0)


def test_an_adapter_changes_proposals_alone():
    """Every law of one token a block, of groups and of streams stays, bit for bit."""
    model, bare = standalone(MODELS["features"]), standalone(MODELS["features"])
    for name, param in bare.named_parameters():
        if "adapter" in name or "draft_" in name:
            param.zero_()
    tokens = _random_tokens(2, 16, model.config.vocab_size)
    for layout in layouts(16).values():
        assert torch.equal(*(one.logits(tokens, *_tensors(layout)) for one in (model, bare)))
    assert not torch.allclose(model.acceptance(tokens, 1), bare.acceptance(tokens, 1))


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        pytest.param(lambda draft: 1.0, 8, id="rows cost nothing"),
        pytest.param(lambda draft: 1.0 + 9.0 * draft, 0, id="rows cost more than they bring"),
        pytest.param(lambda draft: 1.0 if draft <= 2 else 9.0, 2, id="two are free"),
    ],
)
def test_automatic_drafts(monkeypatch, seconds, chosen):
    model = tiny_distribution(4, 12)
    monkeypatch.setattr(model, "_seconds_of_a_pass", lambda draft, count: seconds(draft))
    auto, fixed = (model.generate(batch=3, decoding=Decoding(draft=draft)) for draft in ("auto", chosen))
    assert model.draft_length() == chosen
    assert torch.equal(auto, fixed)


def test_automatic_drafts_are_measured_once(monkeypatch):
    model = tiny_distribution(4, 12)
    assert model.draft_length() in (0, 1, 2, 3, 4, 6, 8)
    monkeypatch.setattr(model, "_seconds_of_a_pass", None)
    assert model.draft_length() == model.draft_length()


@pytest.mark.parametrize("lags", [0, 9])
def test_acceptance_of_no_place_is_refused(lags):
    model = standalone(MODELS["paper"])
    with pytest.raises(InputError, match="lags must be from 1 to 8"):
        model.acceptance(_random_tokens(1, 9, model.config.vocab_size), lags)
