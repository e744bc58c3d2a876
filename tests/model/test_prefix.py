"""Prefix aggregation: the kernel's shape, and the chunked form against the sum that defines it."""

import math
import types
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armd_scale.config import ModelConfig
from armd_scale.model import flops, prefix
from armd_scale.model.prefix import PrefixAggregation, position_table
from armd_scale.rows import Rows, Visible
from tests.conftest import MODELS, PAPER

SERIAL = types.SimpleNamespace(params_dtype=torch.float32, tensor_model_parallel_size=1, context_parallel_size=1)
"""What the layer reads of Megatron's configuration."""


def rows_of(context, targets, visible=None):
    """Rows of which the prefix aggregation reads positions and visibility; tokens are the numbers of the rows."""
    numbers = torch.arange(context.shape[1]).expand_as(context)
    if visible is None:
        return Rows(numbers, context, numbers, targets, None)
    reach = int((numbers + 1 - visible).max())
    return Rows(numbers, context, numbers, targets, Visible(visible, visible, visible), reach=reach)


def seeds_of(layer, x_NBd, rows):
    """Seeds of the targets, with their neighbours."""
    seeds = layer([x_NBd.transpose(0, 1)], rows)[0]
    if layer.prefix_config.neighbour:
        row_BN, seen_BN = prefix.neighbours(rows, rows.target_positions)
        found = x_NBd.gather(0, row_BN.t()[..., None].expand_as(x_NBd))
        seeds = seeds + found * seen_BN.t()[..., None]
    return seeds


@pytest.mark.parametrize("width", [2.0, 3.0, 8.0])
def test_gaussian_kernel(width):
    """<PE(p), PE(q)> is exp(-(p - q)^2 / 2 width^2) near by, and small everywhere else."""
    table = position_table(1024, "gaussian", 768, width)
    kernel = table @ table[0]
    distance = torch.arange(1024, dtype=torch.float64)
    gap = (kernel - torch.exp(-(distance**2) / (2 * width**2))).abs()
    assert float(gap[: int(3 * width)].max()) < 0.002
    assert float(gap.max()) < 0.05
    assert float(gap.pow(2).mean().sqrt()) < 0.02
    # a function of the distance alone
    torch.testing.assert_close(table[50:60] @ table[50], kernel[:10])


def test_sinusoid_rows_have_unit_length():
    table = position_table(100, "sinusoid", 32, 3.0)
    torch.testing.assert_close(table.norm(dim=1), torch.ones(100, dtype=torch.float64))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_chunks_equal_the_sum(kind, chunk, monkeypatch):
    monkeypatch.setattr(prefix, "rows_of_chunk", lambda config: chunk)
    _compare(MODELS[kind], None, 0)


@pytest.mark.parametrize(
    ("length", "dim", "work"),
    [(1024, 768, 1024), (1536, 768, 1536), (1538, 768, 1024 + 1536), (8192, 64, 256), (512, 8, 144)],
)
def test_short_texts_are_one_chunk_and_long_ones_have_a_state(length, dim, work):
    """The work for a target is the smaller of the two ways'."""
    config = ModelConfig(layers=2, hidden=128, heads=2, length=length, prefix={"dim": dim, "width": 2.0})
    assert flops.embedding_macs(config) == work * 128


@given(
    st.lists(st.integers(1, 16), min_size=16, max_size=16), st.sampled_from(list(MODELS)), st.sampled_from([1, 3, 16])
)
def test_any_visibility_equals_the_sum(visible, kind, chunk):
    limits = torch.tensor([min(v, n + 1) for n, v in enumerate(sorted(visible))])
    with mock.patch.object(prefix, "rows_of_chunk", return_value=chunk):
        _compare(MODELS[kind], limits, 1)


def _compare(config, visible, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = PrefixAggregation(config, SERIAL)
    for param in layer.parameters():
        torch.nn.init.normal_(param, generator=generator)
    x = torch.randn(16, 2, config.hidden, generator=generator, dtype=torch.float64)
    targets = torch.stack([torch.randperm(16, generator=generator) + 1 for _ in range(2)])
    context = torch.cat([torch.zeros(2, 1, dtype=torch.long), targets[:, :-1]], 1)
    limits = None if visible is None else visible.expand(2, 16)
    got = seeds_of(layer, x, rows_of(context, targets, limits))
    tables = [position_table(17, config.prefix.kernel, config.prefix_dim, width) for width in config.prefix.widths]
    if config.prefix.kernel == "learned":
        tables = [layer.table.double()]
    gates = [1.0] if layer.gate is None else layer.gate.double()
    for b in range(2):
        for n in range(16):
            seen = n + 1 if visible is None else int(visible[n])
            total = sum(
                gate * (table[targets[b, n]] @ table[context[b, i]]) * x[i, b]
                for gate, table in zip(gates, tables, strict=True)
                for i in range(seen)
            )
            total = total / {"none": 1, "sqrt": math.sqrt(seen), "mean": seen}[config.prefix.scale]
            if layer.target_projection is not None:
                total = total + layer.target_projection.double() @ tables[0][targets[b, n]]
            if config.prefix.neighbour:
                total = total + sum(x[i, b] for i in range(seen) if context[b, i] == targets[b, n] - 1)
            torch.testing.assert_close(got[n, b], total.detach(), atol=1e-9, rtol=1e-9)


def test_unchanged_when_the_future_changes():
    layer = PrefixAggregation(PAPER, SERIAL)
    x = torch.randn(16, 1, 32)
    positions = torch.arange(16)[None]
    before = seeds_of(layer, x, rows_of(positions, positions + 1))
    x[10] = 1e6
    after = seeds_of(layer, x, rows_of(positions, positions + 1))
    assert torch.equal(before[:10], after[:10])
    assert not torch.equal(before[10], after[10])
