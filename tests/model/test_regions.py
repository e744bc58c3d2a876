"""Fused regions: their results when compiled, and what they declare to keep for the backward pass."""

import pytest
import torch

from armd_scale.model import attention, layers, prefix
from armd_scale.model.regions import REGIONS, fused, intercepted

g = torch.Generator().manual_seed(0)
x, pair, scale = (torch.randn(shape, generator=g) for shape in ((5, 3, 16), (5, 6, 16), (16,)))
heads, angles = torch.randn(5, 3, 2, 8, generator=g), torch.randn(5, 3, 1, 4, generator=g)
head_scale = torch.randn(8, generator=g)
targets = torch.randint(0, 16, (5, 3), generator=g)
rope = angles.cos(), angles.sin()
keys_values = heads.unsqueeze(2).expand(-1, -1, 3, -1, -1)
seen = torch.ones(5, 3, 3, dtype=torch.bool).tril()
CASES = {
    "layernorm": (layers.normalise, (x, scale, 1e-5, True)),
    "rmsnorm": (layers.normalise, (x, scale, 1e-5, False)),
    "sum": (layers.add_normalise, (x, x.flip(0), scale, 1e-5, True)),
    "sum of streams": (layers.add_normalise_streams, (pair, pair.flip(0), scale, 1e-5, True, 3, 0)),
    "one stream dropped": (layers.add_normalise_streams, (pair, None, scale, 1e-5, False, 3, 3)),
    "queries as heads": (layers.rotate_queries, (heads, *rope, 2, 1, True)),
    "queries as rows": (layers.rotate_queries, (heads, *rope, 1, 3, False)),
    "normalised queries": (layers.rotate_queries, (heads, *rope, 2, 1, True, head_scale, 1e-5)),
    "keys": (layers.rotate_keys, (keys_values, *rope)),
    "normalised keys": (layers.rotate_keys, (keys_values, *rope, head_scale, 1e-5)),
    "gate": (layers.gate, (x,)),
    "cross-entropy": (layers.cross_entropy, (x, targets, 16)),
    "cross-entropy of a padded vocabulary": (layers.cross_entropy, (x, targets.clamp(max=12), 13)),
    "kernel": (prefix.look_up, (targets, targets.flip(1), seen, scale)),
}


def test_every_region_has_a_case():
    compiled = {name for name, region in REGIONS.items() if region.work is None}
    assert {region.__name__ for region, _ in CASES.values()} == compiled


def test_attention_with_a_mask_declares_what_it_does():
    """Its products, against those of the keys that rows see; what it keeps, against the saved tensors."""
    region, length = attention.masked, 300
    q = torch.randn(2, 1, 2, 2, length, 8, requires_grad=True)
    k, v = (torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(2))
    spans = tuple(
        attention.Span(slice(at, min(at + 64, length)), slice(0, min(at + 64, length))) for at in range(0, length, 64)
    )
    seen = attention.Seen(torch.arange(1, length + 1)[None, None], spans=spans)
    pairs = length * (length + 1) // 2
    assert region.work(q, k, v, seen) == pytest.approx(2 * 2 * 8 * pairs * 2 * 4, rel=0.01)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t.nbytes), lambda t: t):
        out = region(q, k, v, seen)
    sums = 4 * 2 * 4 * length
    assert sum(kept.values()) == sum(t.nbytes for t in region.keeps([q, k, v], [out])) + sums


def test_a_region_must_declare_what_it_keeps():
    with pytest.raises(TypeError, match="keeps"):
        fused()


def prepared(inputs, dtype, device):
    """Inputs of a type on a device; those of floating point want gradients."""
    moved = [one.to(device) if torch.is_tensor(one) else one for one in inputs]
    return [
        one.to(dtype).requires_grad_() if torch.is_tensor(one) and one.is_floating_point() else one for one in moved
    ]


def outputs(made):
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "cuda"])
def test_compiled_without_a_break_it_is_the_function_in_float64(case, backend, request):
    if backend == "inductor" and not request.config.getoption("--parity"):
        pytest.skip("compiles for half a minute: make parity")
    if backend == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    region, inputs = CASES[case]
    name, place = ("inductor", "cuda") if backend == "cuda" else (backend, "cpu")
    compiled = torch.compile(region.function, backend=name, fullgraph=True, dynamic=False)
    results = []
    for function, dtype, device in ((region.function, torch.float64, "cpu"), (compiled, torch.float32, place)):
        arguments = prepared(inputs, dtype, device)
        made = outputs(function(*arguments))
        assert all(out.is_contiguous() for out in made)
        wanted = [one for one in arguments if torch.is_tensor(one) and one.requires_grad]
        loss = sum((out * out.detach().sin()).sum() for out in made)
        results.append([*made, *torch.autograd.grad(loss, wanted)])
    for exact, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double().cpu(), exact.double(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_region_keeps_no_more_than_it_declares(case):
    """Beside a few numbers for each row, such as the deviations of a norm."""
    region, inputs = CASES[case]
    compiled = torch.compile(region.function, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    constants = {id(table) for table in rope} | ({id(scale)} if region is prefix.look_up else set())
    arguments = [
        given.detach() if id(given) in constants else one
        for one, given in zip(prepared(inputs, torch.float32, "cpu"), inputs, strict=True)
    ]
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = outputs(compiled(*arguments))
    read = [one for one in arguments if torch.is_tensor(one)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in region.keeps(read, made)}
    rows = read[0].shape[:-1].numel()
    assert sum(kept.values()) <= sum(storages.values()) + 3 * 4 * rows


def test_inside_a_plan_no_region_runs():
    asked = []
    with intercepted(lambda region, *inputs: asked.append(region.__name__)):
        layers.gate(x)
    assert asked == ["gate"]
    assert layers.gate(x).shape == (5, 3, 8)
