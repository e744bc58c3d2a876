"""FP8 rounding against all numbers that the types have, and the linears against the products of rounded numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.spec_utils import build_module

from armd_scale.config import ParallelConfig
from armd_scale.model.float8 import rounded
from armd_scale.model.layers import linears
from armd_scale.parallel import groups
from tests.conftest import PAPER

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.sampled_from([FORWARD, BACKWARD]))
def test_every_number_becomes_the_nearest_one(values, dtype):
    x = torch.tensor(values)
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    codes = codes[codes.isfinite()]
    scale = float(codes.max()) / max(float(x.abs().max()), 1e-300) if x.any() else 1.0
    found = rounded(x, dtype).double()
    distance = (x.double()[:, None] * scale - codes).abs().min(dim=1).values
    np.testing.assert_allclose((found * scale - x.double() * scale).abs(), distance, atol=1e-6 * float(codes.max()))
    assert rounded(x.bfloat16(), dtype).dtype is torch.bfloat16


@pytest.mark.parametrize("size", [1e-30, 1e-35, 1e-38])
@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD], ids=str)
def test_tiny_numbers_stay_numbers(dtype, size):
    x = torch.tensor([size, 0.0, -size / 2], dtype=torch.bfloat16)
    assert rounded(x, dtype).isfinite().all()


@pytest.mark.one_process
@pytest.mark.parametrize("kind", ["column", "row"])
def test_linears_multiply_rounded_numbers(kind):
    config = groups.transformer_config(PAPER, ParallelConfig(), torch.float32, fp8=True)
    options = {"gather_output": False} if kind == "column" else {"input_is_parallel": True}
    linear = build_module(
        getattr(linears(fp8=True), kind), 16, 32, config=config, init_method=torch.nn.init.normal_, bias=False,
        is_expert=False, skip_bias_add=False, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.nn.init.normal_(linear.weight)
    x, gradient = torch.randn(5, 3, 16, requires_grad=True), torch.randn(5, 3, 32)
    out, _ = linear(x)
    out.backward(gradient)
    weight, inputs, down = (
        rounded(linear.weight.detach(), FORWARD),
        rounded(x.detach(), FORWARD),
        rounded(gradient, BACKWARD),
    )
    torch.testing.assert_close(out, inputs @ weight.t())
    torch.testing.assert_close(x.grad, down @ weight)
    torch.testing.assert_close(linear.weight.grad, down.flatten(0, 1).t() @ inputs.flatten(0, 1))
    assert not torch.allclose(out, x @ linear.weight.t(), atol=1e-3), "this would be no FP8"
