"""Every attention backend against the dense one."""

import functools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from armd_scale.model import attention
from armd_scale.model.attention import Seen, Span


def _inputs(streams, batch, heads, key_heads, rows, keys, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(streams, batch, key_heads, heads // key_heads, rows, 8, generator=g, dtype=dtype)
    k, v = (torch.randn(batch, key_heads, keys, 8, generator=g, dtype=dtype) for _ in range(2))
    visible = torch.randint(1, keys + 1, (streams, batch, rows), generator=g).sort(-1).values
    return [q, k, v], visible


def _run(end, seed):
    """Keys from a first one, which grows along the rows and is before the end, to ``end``."""
    first = torch.rand(end.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first = (first * end).long().flip(-1).cummin(-1).values.flip(-1)
    return Seen(end, first)


def _gradients(function, tensors, seen):
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors, seen)
    weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    return out, torch.autograd.grad((out * weight).sum(), tensors)


@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_sdpa_equals_dense(streams, batch, heads, rows, seed):
    tensors, visible = _inputs(streams, batch, *heads, rows, rows, seed)
    for limits in (None, Seen(visible), Seen(visible[:, :1]), _run(visible.clone(), seed)):
        _compare(tensors, limits)
    everything = Seen(torch.full_like(visible, rows))
    torch.testing.assert_close(attention.attend(*tensors, None, causal=False), attention.dense(*tensors, everything))
    torch.testing.assert_close(attention.dense(*tensors, None, causal=False), attention.dense(*tensors, everything))


@given(
    st.integers(1, 2),
    st.sampled_from([(4, 4), (4, 2)]),
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_calls_for_blocks_of_rows_equal_dense(streams, heads, sizes, seed):
    """With one token a block, for texts that are cut into documents in different ways; blocks cross their borders."""
    rows = max(map(sum, sizes))
    sizes = [[*text, *[1] * (rows - sum(text))] for text in sizes]
    first = torch.tensor([[sum(text[:n]) for n, size in enumerate(text) for _ in range(size)] for text in sizes])
    tensors, _ = _inputs(streams, len(sizes), *heads, rows, rows, seed)
    for piece in (3, 128):
        with mock.patch.object(attention, "PIECE", piece):
            seen = Seen(torch.arange(1, rows + 1).expand_as(first)[None], first[None])
            _compare(tensors, seen)
            seen = Seen(torch.arange(1, rows + 1)[None, None])
            _compare(tensors, seen)
            starts = range(0, rows, piece)
            spans = tuple(Span(slice(at, at + piece), slice(0, min(at + piece, rows))) for at in starts)
            _compare(tensors, Seen(seen.end.clone(), spans=spans))


def _compare(tensors, seen):
    expected, expected_gradients = _gradients(attention.dense, tensors, seen)
    got, gradients = _gradients(attention.attend, tensors, seen)
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 99), st.booleans())
def test_block_masks_show_what_is_visible(rows, keys, seed, documents):
    """The block mask that is written down at once is the one that PyTorch finds by looking at every key."""
    _, visible = _inputs(1, 2, 1, 1, rows, keys, seed)
    first = _run(visible, seed).first[0] if documents else None
    mask = attention.block_mask(visible[0], first, keys)

    def sees(b, h, row, key):
        return (key < visible[0][b, row]) & (key >= (0 if first is None else first[b, row]))

    expected = create_block_mask(sees, 2, None, rows, keys, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(expected, name))
    for kind in ("", "full_"):
        count = getattr(mask, f"{kind}kv_num_blocks")[..., None]
        there = torch.arange(getattr(mask, f"{kind}kv_indices").shape[-1]) < count
        found, wanted = (getattr(one, f"{kind}kv_indices") for one in (mask, expected))
        assert torch.equal(found[there], wanted[there])


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 2, 4, 1, 33, 8), id="one-stream"),
        pytest.param((2, 2, 4, 1, 33, 8), id="two-streams"),
        pytest.param((2, 1, 2, 2, 33, 8), id="grouped-heads"),
    ],
)
def test_kernels_are_measured_and_equal_to_dense(shape):
    """On CPU, PyTorch's flash attention is the one kernel that can be asked for."""
    table = attention.measure(shape, torch.float32, torch.device("cpu"), repeats=3)
    assert "flash" in table
    assert all(seconds > 0 for seconds in table.values())
    streams, batch, key_heads, more, rows, _ = shape
    tensors, _ = _inputs(streams, batch, key_heads * more, key_heads, rows, rows, 1, torch.float32)
    expected, expected_gradients = _gradients(attention.dense, tensors, None)
    for kernel in table:
        got, gradients = _gradients(functools.partial(attention.attend, kernel=kernel), tensors, None)
        torch.testing.assert_close(got, expected)
        for a, b in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(1, 2, 4, 1, 256, 64), (2, 2, 4, 1, 256, 64), (2, 1, 2, 2, 256, 64)])
def test_kernels_equal_dense_on_gpu(shape):
    """In bfloat16, within its rounding."""
    table = attention.measure(shape, torch.bfloat16, torch.device("cuda", 0), repeats=3)
    assert {"flash", "cudnn"} <= set(table)
    _, batch, key_heads, _, rows, width = shape
    g = torch.Generator().manual_seed(0)
    sizes = shape, (batch, key_heads, rows, width), (batch, key_heads, rows, width)
    tensors = [torch.randn(size, generator=g).bfloat16().double() for size in sizes]
    expected, expected_gradients = _gradients(attention.dense, tensors, None)
    for kernel in table:
        attention.activate(kernel)
        on_gpu = [t.bfloat16().cuda().requires_grad_() for t in tensors]
        out = attention.sdpa(*on_gpu, kernel=kernel)
        weight = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).sin().bfloat16().cuda()
        gradients = torch.autograd.grad((out * weight).sum(), on_gpu)
        for found, wanted in zip([out, *gradients], [expected, *expected_gradients], strict=True):
            assert float((found.double().cpu() - wanted).norm() / wanted.norm()) < 0.02, kernel
    attention.activate(None)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("streams", [1, 2])
def test_flex_equals_dense(heads, streams):
    """Forward only: flex_attention has no backward pass on CPU."""
    tensors, visible = _inputs(streams, 2, *heads, 40, 40, 1, torch.float32)
    for seen in (Seen(visible), Seen(visible.clone().fill_(1)), _run(visible.clone(), 1)):
        expected = attention.dense(*tensors, seen)
        for _ in range(2):  # the second time by the mask that was kept
            torch.testing.assert_close(attention.flex(*tensors, seen), expected, atol=1e-5, rtol=1e-5)
        assert seen.end in attention._KNOWN
    # one mask for all streams, and another number of streams with it
    shared = Seen(visible[:1].clone())
    for count in range(1, streams + 1):
        some = tensors[0][:count], *tensors[1:]
        torch.testing.assert_close(attention.flex(*some, shared), attention.dense(*some, shared), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("streams", [1, 2])
def test_flex_backward_on_gpu(streams):
    tensors, visible = _inputs(streams, 2, 4, 2, 256, 256, 1, torch.float32)
    expected, expected_gradients = _gradients(attention.dense, tensors, _run(visible, 1))
    on_gpu = [t.detach().cuda().requires_grad_() for t in tensors]
    out = attention.flex(*on_gpu, Seen(*(edge.cuda() for edge in _run(visible, 1)[:2])))
    weight = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin().cuda()
    gradients = torch.autograd.grad((out * weight).sum(), on_gpu)
    torch.testing.assert_close(out.cpu(), expected, atol=2e-3, rtol=2e-3)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=5e-3, rtol=5e-3)


def test_dense_by_hand():
    q = torch.zeros(1, 1, 1, 1, 2, 8, dtype=torch.float64)
    v = torch.tensor([1.0, 3.0], dtype=torch.float64)[None, None, :, None].expand(1, 1, 2, 8)
    out = attention.dense(q, torch.randn(1, 1, 2, 8, dtype=torch.float64), v)
    torch.testing.assert_close(out[0, 0, 0, 0, :, 0], torch.tensor([1.0, 2.0], dtype=torch.float64))
