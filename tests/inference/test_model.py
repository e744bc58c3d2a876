"""The standalone model against the dense float64 reference, and the identities of the design."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armd_scale import inference, orders
from armd_scale.inference import InputError
from tests import reference
from tests.conftest import MODELS, layouts, standalone, tiny_distribution


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


@given(st.data())
def test_strict_causality_is_exact(data):
    """Identity 1: a token of a block >= B(n) does not change the output at n by a single bit."""
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
    """Identity 1, by derivatives with respect to the embedding of each context token."""
    model = standalone(MODELS["paper"])
    tokens = torch.arange(3, 15)[None]  # all different, so a row of the embedding is a position
    for layout in layouts(12).values():
        order, blocks = _tensors(layout)
        weight = model.embedding.weight.detach().clone()

        def activations(rows, order=order, blocks=blocks):
            model.embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
            model.embedding._parameters["weight"] = rows
            return model._one_pass(tokens, order[None], blocks[None])[0].sum(-1)

        jacobian = torch.autograd.functional.jacobian(activations, weight)[:, 3:15].abs().sum(-1)
        model.embedding._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
        for n in range(12):
            sees = {int(order[i]) for i in range(12) if blocks[i] < blocks[n]}
            for position in range(1, 13):
                assert (jacobian[n, position - 1] > 0) == (position in sees)


@given(st.integers(0, 10**6))
def test_equivariance(seed):
    """Identity 2: swapping tokens of one block, with their positions, changes nothing but the order of the outputs."""
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
    """Identity 3."""
    model, length, vocab = tiny_distribution(3, 5), 5, 3
    order, blocks = _tensors(layouts(length)[layout])
    texts = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
    total = (-model.nll(texts, order, blocks).sum(1)).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-10)


def test_left_to_right_is_the_product_of_its_steps():
    """Identity 5: token n scored in the whole text and at the end of a text that stops there."""
    model = standalone(MODELS["modern"])
    tokens = _random_tokens(3, 16, 50)
    whole = model.nll(tokens)
    for n in range(1, 17):
        torch.testing.assert_close(whole[:, n - 1], model.nll(tokens[:, :n])[:, -1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("streams", [1, 2, 4, 8])
@pytest.mark.parametrize(("prompt", "length"), [(0, 16), (0, 13), (3, 16), (5, 14), (1, 2), (15, 16)])
def test_cached_decoding_equals_one_pass(kind, streams, prompt, length, monkeypatch):
    """Identity 6: the logits of every step are those of one pass over the finished text, in the same layout."""
    model = standalone(MODELS[kind])
    given_tokens = _random_tokens(3, prompt, model.config.vocab_size)
    seen = []
    original = inference.modeling_armd._sample

    def spy(logits, uniform, temperature):
        seen.append(logits)
        return original(logits, uniform, temperature)

    monkeypatch.setattr(inference.modeling_armd, "_sample", spy)
    text = model.generate(given_tokens, length=length, streams=streams, seed=4)
    assert text.shape == (3, length)
    assert torch.equal(text[:, :prompt], given_tokens)
    blocks = inference.strided_blocks(prompt, length, streams)
    free = length - prompt
    assert len(seen) == len(blocks) == min(streams, free) + math.ceil(free / min(streams, free)) - 1
    order = torch.tensor([*range(1, prompt + 1), *(p for block in blocks for p in block)])
    ids = torch.tensor([*range(1, prompt + 1), *(prompt + b for b, block in enumerate(blocks, 1) for _ in block)])
    one_pass = model.logits(text, order, ids)
    for block, logits in zip(blocks, seen, strict=True):
        expected = one_pass[:, [p - 1 for p in block]]
        torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("streams", [1, 4])
def test_a_sequence_does_not_depend_on_its_batch(streams, dtype):
    model = standalone(MODELS["paper"]).to(dtype)
    prompts = _random_tokens(5, 3, 50)
    together = model.generate(prompts, streams=streams, seed=[11, 12, 13, 14, 15])
    for row in range(5):
        alone = model.generate(prompts[row], streams=streams, seed=11 + row)
        assert torch.equal(together[row : row + 1], alone)
    torch.testing.assert_close(model.nll(together)[2:3], model.nll(together[2:3]), atol=1e-5, rtol=1e-5)


def test_seeds():
    model = standalone(MODELS["paper"])
    first = model.generate(seed=1, batch=4, streams=2)
    assert torch.equal(first, model.generate(seed=1, batch=4, streams=2))
    assert not torch.equal(first, model.generate(seed=2, batch=4, streams=2))
    assert len({tuple(row) for row in first.tolist()}) == 4


def test_temperature_zero_takes_the_likeliest_token():
    model = standalone(MODELS["paper"])
    text = model.generate(temperature=0, batch=2)
    assert torch.equal(text, model.logits(text).argmax(-1))


def _chi_square(model, streams, samples, expected_of):
    """p-value of the observed counts of whole texts against their enumerated probabilities."""
    from scipy.stats import chisquare

    vocab, length = model.config.vocab_size, model.config.length
    texts = torch.cat([model.generate(streams=streams, seed=seed, batch=samples // 4) for seed in range(4)])
    code = (texts * vocab ** torch.arange(length)).sum(1)
    observed = torch.bincount(code, minlength=vocab**length).double()
    every = torch.tensor(list(itertools.product(range(vocab), repeat=length))).flip(1)
    expected = expected_of(every) * samples
    assert float(expected.sum()) == pytest.approx(samples)
    rare = expected < 5
    if rare.any():
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    return chisquare(observed.numpy(), expected.numpy()).pvalue


def test_sampled_distribution_one_stream():
    """S = 1: texts come as often as their exact probabilities say."""
    model = tiny_distribution(3, 4)
    assert _chi_square(model, 1, 20_000, lambda texts: (-model.nll(texts).sum(1)).exp()) > 1e-3


def test_sampled_distribution_two_streams():
    """S = 2: the product of the block conditionals; and the one-stream distribution is clearly another one."""
    model = tiny_distribution(3, 4)
    order, blocks = _tensors(orders.strided(4, 2))
    assert _chi_square(model, 2, 20_000, lambda texts: (-model.nll(texts, order, blocks).sum(1)).exp()) > 1e-3
    assert _chi_square(model, 2, 20_000, lambda texts: (-model.nll(texts).sum(1)).exp()) < 1e-6


@pytest.mark.parametrize(
    "broken", [lambda u: u * 0.9, lambda u: u.roll(1, 0)[:1].expand(u.shape)], ids=["squeezed", "shared between texts"]
)
def test_a_broken_sampler_is_caught(monkeypatch, broken):
    """The chi-square test has teeth: uniform numbers that are squeezed, or the same for a whole batch."""
    model = tiny_distribution(3, 4)
    original = inference.modeling_armd._sample
    monkeypatch.setattr(inference.modeling_armd, "_sample", lambda logits, u, t: original(logits, broken(u), t))
    assert _chi_square(model, 1, 20_000, lambda texts: (-model.nll(texts).sum(1)).exp()) < 1e-6


@given(st.integers(0, 12), st.integers(1, 20), st.integers(1, 24))
def test_strided_blocks_are_the_training_layout(start, count, streams):
    blocks = inference.strided_blocks(start, start + count, streams)
    layout = orders.strided(count, streams)
    assert [p - start for block in blocks for p in block] == layout.order.tolist()
    assert [b for b, block in enumerate(blocks, 1) for _ in block] == layout.block_ids.tolist()


def test_bad_input_is_one_line():
    model = standalone(MODELS["paper"])
    ok = torch.zeros(1, 4, dtype=torch.long)
    cases = [
        (lambda: model.nll(torch.zeros(1, 17, dtype=torch.long)), "does not fit this model"),
        (lambda: model.nll(torch.zeros(1, 0, dtype=torch.long)), "does not fit this model"),
        (lambda: model.nll(ok + 50), "token 50 is not in the vocabulary of 50"),
        (lambda: model.nll(ok - 1), "token -1 is not"),
        (lambda: model.nll(ok.float()), "whole numbers"),
        (lambda: model.nll(ok, torch.tensor([1, 1, 2, 3])), "permutation of 1..4"),
        (lambda: model.nll(ok, torch.tensor([0, 1, 2, 3])), "permutation of 1..4"),
        (lambda: model.nll(ok, torch.tensor([1, 2, 3])), "order must be"),
        (lambda: model.nll(ok, None, torch.tensor([1, 3, 2, 4])), "never decrease"),
        (lambda: model.nll(ok, None, torch.tensor([0, 1, 2, 4])), "start at 1"),
        (lambda: model.generate(torch.zeros(1, 17, dtype=torch.long)), "prompt has 17 tokens"),
        (lambda: model.generate([1, 2, 3], length=2), "prompt has 3 tokens"),
        (lambda: model.generate(length=17), "length 17 does not fit"),
        (lambda: model.generate(streams=0), "streams must be"),
        (lambda: model.generate(temperature=-1.0), "temperature must be"),
        (lambda: model.generate(temperature=float("nan")), "temperature must be"),
        (lambda: model.generate(seed=[1, 2], batch=3), "2 seeds for 3 sequences"),
    ]
    for call, line in cases:
        with pytest.raises(InputError, match=line):
            call()


def test_a_full_prompt_is_returned():
    model = standalone(MODELS["paper"])
    prompt = _random_tokens(2, 16, 50)
    assert torch.equal(model.generate(prompt), prompt)


def test_the_package_imports_neither_megatron_nor_deepspeed():
    code = "import sys, armd_scale.inference; print(sorted({m.split('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch" in out
    for name in ("megatron", "deepspeed", "transformers", "wandb", "submitit", "pydantic"):
        assert f"'{name}'" not in out
