"""Separate documents of a packed sample: each is scored and trained as it is alone."""

import numpy as np
import pytest
import torch

from armd_scale import orders, packing
from armd_scale.model import attention, prefix
from armd_scale.objectives.card import noised_rows
from armd_scale.rows import arrange, corrupt, look_ahead
from tests.conftest import BASELINES, MODELS
from tests.model.test_network import build, expected_laws

LENGTHS = [[5, 1, 7, 3], [16], [2, 14]]
"""Documents of the samples of a batch."""
STARTS = packing.starts(np.array([[n in np.cumsum([0, *sizes]) for n in range(16)] for sizes in LENGTHS]))
TOKENS = np.random.default_rng(0).integers(0, 50, (3, 16))
LAYOUTS = {
    "left-to-right": lambda size, seed: orders.left_to_right(size),
    "random": lambda size, seed: orders.shuffled(size, size, seed),
    "strided": lambda size, seed: orders.strided(size, min(3, size)),
    "groups": lambda size, seed: orders.groups(size, 3, 1),
}


def alone():
    """The documents with the sample and the tokens of the sample that they are."""
    for sample, sizes in enumerate(LENGTHS):
        for start, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False):
            yield sample, slice(start, start + size)


def packed(kind, config):
    layouts = [orders.join([LAYOUTS[kind](size, size) for size in sizes]) for sizes in LENGTHS]
    together = orders.Layout(*(np.stack(field) for field in zip(*layouts, strict=True)))
    return arrange(TOKENS, together, config.bos_id, STARTS)


def gradients(stage, loss):
    stage.zero_grad()
    loss.backward()
    return {name: param.grad.clone() for name, param in stage.named_parameters() if param.grad is not None}


def agree(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3, msg=name)


@pytest.mark.one_process
@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_documents_are_scored_as_they_are_alone(kind, order, monkeypatch):
    """Against the float64 reference of every document by itself; gradients against those of the documents alone."""
    config = MODELS[kind]
    for chunk, piece in ((16, 128), (3, 3)):
        monkeypatch.setattr(prefix, "rows_of_chunk", lambda _, chunk=chunk: chunk)
        monkeypatch.setattr(attention, "PIECE", piece)
        stage = build(config)
        nll = stage(packed(order, config))
        losses = []
        for sample, part in alone():
            layout = LAYOUTS[order](part.stop - part.start, part.stop - part.start)
            tokens = TOKENS[sample, part]
            logp = expected_laws(stage, config, tokens, layout)
            expected = -logp.gather(1, torch.from_numpy(tokens[layout.order - 1])[:, None])[:, 0]
            torch.testing.assert_close(nll[sample, part].detach().double(), expected, atol=1e-4, rtol=1e-5)
            losses.append(stage(arrange(tokens[None], layout, config.bos_id)).sum())
        agree(gradients(stage, nll.sum()), gradients(stage, sum(losses)))


@pytest.mark.one_process
@pytest.mark.parametrize("kind", MODELS)
def test_drafts_stay_in_their_document(kind):
    config = MODELS[kind]
    stage = build(config)
    lags = np.random.default_rng(1).integers(1, 4, (3, 16))
    planes = stage(look_ahead(packed("left-to-right", config), lags))
    for sample, part in alone():
        rows = arrange(TOKENS[sample : sample + 1, part], orders.left_to_right(part.stop - part.start), config.bos_id)
        expected = stage(look_ahead(rows, lags[sample : sample + 1, part]))
        torch.testing.assert_close(planes[:, sample, part], expected[:, 0], atol=1e-4, rtol=1e-5)


@pytest.mark.one_process
@pytest.mark.parametrize("kind", BASELINES)
def test_documents_of_baselines_are_scored_as_they_are_alone(kind):
    config = BASELINES[kind]
    stage = build(config)
    masked = np.random.default_rng(2).random(TOKENS.shape) < 0.5

    def rows(tokens, masked, starts=None):
        if config.objective == "mdm":
            return corrupt(tokens, masked, np.ones_like(tokens), config.vocab_size, starts)
        if config.traits.mask:
            return noised_rows(config, tokens, masked, starts)
        return arrange(tokens, orders.left_to_right(tokens.shape[1]), config.bos_id, starts)

    nll, losses = stage(rows(TOKENS, masked, STARTS)), []
    for sample, part in alone():
        here = slice(sample, sample + 1), part
        losses.append(stage(rows(TOKENS[here], masked[here])))
        torch.testing.assert_close(nll[here], losses[-1], atol=1e-4, rtol=1e-5)
    agree(gradients(stage, nll.sum()), gradients(stage, sum(loss.sum() for loss in losses)))


@pytest.mark.one_process
def test_a_leak_over_a_border_is_seen(monkeypatch):
    """Broken twins: a row that sees the last token of the document before, in attention and in the seed."""
    config = MODELS["features"]
    rows = packed("left-to-right", config)
    other = rows._replace(context_tokens=rows.context_tokens.clone())
    other.context_tokens[0, 4] += 1  # in the first document
    stage = build(config)
    rest = 0, slice(5, None)
    assert torch.equal(stage(rows)[rest], stage(other)[rest])
    real = attention.Seen
    with monkeypatch.context() as patch:
        patch.setattr("armd_scale.model.network.Seen", lambda end, first, *_: real(end, (first - 1).clamp(min=0)))
        assert not torch.equal(stage(rows)[rest], stage(other)[rest])
    forward = prefix.PrefixAggregation.forward
    leaks = lambda self, x, rows: forward(self, x, rows._replace(starts=(rows.starts - 1).clamp(min=0)))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(prefix.PrefixAggregation, "forward", leaks)
        assert not torch.equal(stage(rows)[rest], stage(other)[rest])


def test_rows_of_one_document_are_those_of_joined_text():
    natural = orders.left_to_right(16)
    together = arrange(TOKENS, natural, 1, np.zeros_like(TOKENS))
    for found, known in zip(together[:4], arrange(TOKENS, natural, 1)[:4], strict=True):
        assert torch.equal(found, known)
    assert together.starts is None
