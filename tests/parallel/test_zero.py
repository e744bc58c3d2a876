"""The adapter of DeepSpeed: no other module knows DeepSpeed, and every ZeRO stage keeps the same contract."""

import ast

import pytest
import torch
from torch import nn

from armd_scale.config import RunConfig
from tests.conftest import MODERN, ROOT, run_processes

MODULES = sorted(
    path for folder in ("armd_scale", "data_pipeline", "launchers", "tools") for path in (ROOT / folder).rglob("*.py")
)
ADAPTER = ROOT / "armd_scale/parallel/zero.py"
OTHERS = [path for path in MODULES if path != ADAPTER]
KINDS = {
    (0, "float32"): "Zero0",
    (1, "float32"): "Zero1",
    (1, "bfloat16"): "Zero1BFloat16",
    (2, "float32"): "Zero2",
    (2, "bfloat16"): "Zero2",
    (3, "float32"): "Zero3",
    (3, "bfloat16"): "Zero3",
}
LR, DECAY, CLIP = 0.1, 0.01, 0.5


def nodes(path):
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imports(path):
    """Names of the modules that a file imports."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def private_reads(path):
    """Underscored attributes that a file reads from objects other than ``self``."""
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            text = ast.unparse(node)
            if text.rpartition(".")[0] not in ("self", "cls", "super()"):
                yield text


def conditions(path):
    """Expressions on which a file branches, or by which it looks something up."""
    for node in nodes(path):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            yield node.test
        elif isinstance(node, ast.Compare | ast.BoolOp):
            yield node
        elif isinstance(node, ast.Subscript):
            yield node.slice
        elif isinstance(node, ast.Match):
            yield node.subject


def zero_attributes():
    """Attributes that the adapter reads or sets on DeepSpeed's engine and optimiser."""
    owners = ("self._engine", "self._wrapper")
    return {
        node.attr for node in nodes(ADAPTER) if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners
    }


def test_only_the_adapter_imports_deepspeed():
    found = {path.relative_to(ROOT) for path in OTHERS for name in imports(path) if name.split(".")[0] == "deepspeed"}
    assert not found
    assert any(name.startswith("deepspeed") for name in imports(ADAPTER)), "the check sees an import"


def test_only_the_adapter_reads_attributes_of_deepspeed():
    private = {name for name in zero_attributes() if name.startswith("_")}
    assert "_lazy_init_hp_params_optimizer_state" in private, "the check sees an attribute"
    used = {
        (path.relative_to(ROOT), node.attr)
        for path in OTHERS
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and (node.attr in private or node.attr.startswith("ds_"))
    }
    assert not used
    for path in OTHERS:
        if path.parent.name in ("parallel", "training"):
            assert not list(private_reads(path)), f"{path.name} reads private attributes of other objects"


def test_only_the_adapter_branches_on_the_zero_stage():
    """The configuration also checks the stage, and the planner models the memory and the traffic of every stage."""
    found = {
        (path.relative_to(ROOT), ast.unparse(condition))
        for path in OTHERS
        if path.name != "config.py" and path.parent.name != "planning"
        for condition in conditions(path)
        for node in ast.walk(condition)
        if isinstance(node, ast.Attribute) and node.attr == "zero" and ast.unparse(node.value) != "self"
    }
    assert not found


def config(zero, dtype="float32", processes=2, **parallel):
    return RunConfig.model_validate(
        {
            "model": MODERN.model_dump(),
            "orders": {"ar_steps": 10, "permutation_steps": 10, "rho": 8},
            "optimizer": {"clip": CLIP, "ema": 0.9, "weight_decay": DECAY, "eps": 1e-4},
            "train": {"steps": 10, "global_batch": 8, "micro_batch": 2, "dtype": dtype},
            "parallel": {"zero": zero, **parallel},
            "cluster": {"tasks_per_node": processes},
        }
    )


class Net(nn.Module):
    """A matrix of 15 and a vector of 3 numbers: neither divides into two equal parts."""

    def __init__(self, dtype):
        super().__init__()
        self.matrix = nn.Linear(5, 3, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(3, bias=False, dtype=dtype)

    def forward(self, x):
        return self.norm(self.matrix(x)).float().square().mul(torch.arange(3.0)).sum()


def inputs(rank, micro_batch):
    """Values that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(10 * rank + micro_batch)
    return torch.randint(-4, 5, (4, 5), generator=generator).float()


def start(rank, processes, rendezvous, run):
    """The processes, a network with known weights, and its ZeRO stage."""
    from armd_scale.parallel import groups, zero

    groups.start(run.parallel, rank=rank, processes=processes, rendezvous=rendezvous, device=torch.device("cpu"))
    torch.manual_seed(3)
    net = Net(getattr(torch, run.train.dtype))
    return net, zero.build(run, nn.ModuleList([net]))


def step(stage, net, rank, accepted=True):
    """Two micro-batches and an update; whether it was applied, and the global gradient norm."""
    import torch.distributed as dist

    stage.set_learning_rate(LR)
    with stage.accumulate():
        for micro_batch in range(2):
            net(inputs(rank, micro_batch).to(next(net.parameters()).dtype)).backward()
    squares = stage.squares()
    dist.all_reduce(squares)
    applied, norm = stage.update(torch.tensor(accepted), squares.sqrt())
    return bool(applied), float(norm)


def states(stage, net):
    stage.link_states()
    return {
        (parameter, name): stage.read_state(param, name).detach().clone()
        for parameter, param in net.named_parameters()
        for name in stage.state_names
    }


def _contract(rank, processes, rendezvous, run):
    from armd_scale.parallel import groups

    net, stage = start(rank, processes, rendezvous, run)
    kind, log = type(stage).__name__, []
    log.append(step(stage, net, rank))
    first = states(stage, net)
    refused = step(stage, net, rank, accepted=False)
    unchanged = states(stage, net)
    stage.swap_average()
    swapped = states(stage, net)
    stage.swap_average()
    restored = states(stage, net)
    log.append(step(stage, net, rank))
    second = states(stage, net)
    stage.write_states(net.named_parameters(), lambda param, parameter, name: first[parameter, name], 1)
    written = states(stage, net)
    log.append(step(stage, net, rank))
    again = states(stage, net)
    groups.stop()
    return kind, log, refused, first, unchanged, swapped, restored, second, written, again


def expected(processes):
    """Norms and weights of two steps of ``torch.optim.AdamW`` on the gradients averaged over the ranks, in float32."""
    torch.manual_seed(3)
    net = Net(torch.float32)
    optimizer = torch.optim.AdamW(
        [
            {"params": [net.matrix.weight], "weight_decay": DECAY},
            {"params": [net.norm.weight], "weight_decay": 0.0},
        ],
        lr=LR,
        eps=1e-4,
        betas=(config(0).optimizer.beta1, config(0).optimizer.beta2),
    )
    norms, weights = [], []
    for _ in range(2):
        optimizer.zero_grad()
        for rank in range(processes):
            for micro_batch in range(2):
                (net(inputs(rank, micro_batch)) / processes).backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), CLIP)))
        optimizer.step()
        weights.append({name: param.detach().clone() for name, param in net.named_parameters()})
    return norms, weights


@pytest.mark.parametrize(("zero", "dtype"), KINDS, ids=[f"zero{zero} {dtype}" for zero, dtype in KINDS])
def test_every_stage_keeps_the_contract(zero, dtype):
    """Steps of AdamW, steps that are not accepted, the moving average, and states that are read and written."""
    norms, weights = expected(2)
    results = run_processes(2, _contract, config(zero, dtype))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    for kind, log, refused, first, unchanged, swapped, restored, second, written, again in results:
        assert kind == KINDS[zero, dtype]
        assert [applied for applied, _ in log] == [True, True, True]
        assert [norm for _, norm in log[:2]] == pytest.approx(norms, rel=tolerance["rtol"])
        for name in weights[0]:
            torch.testing.assert_close(first[name, "weight"], weights[0][name], **tolerance)
            torch.testing.assert_close(second[name, "weight"], weights[1][name], **tolerance)
        assert not refused[0]
        for (parameter, name), value in first.items():
            assert value.dtype is torch.float32
            assert torch.equal(unchanged[parameter, name], value), "a step that is not accepted changes nothing"
            assert torch.equal(restored[parameter, name], value)
            assert torch.equal(written[parameter, name], value)
            assert torch.equal(again[parameter, name], second[parameter, name]), "written states continue the run"
        for parameter in weights[0]:
            assert torch.equal(swapped[parameter, "weight"], first[parameter, "ema"])
            assert torch.equal(swapped[parameter, "ema"], first[parameter, "weight"])
            assert not torch.equal(second[parameter, "weight"], second[parameter, "ema"])
    for other in results[1:]:
        for part in (3, 7):
            for key, value in results[0][part].items():
                assert torch.equal(other[part][key], value), "all data-parallel ranks read the same states"


def _partial(rank, processes, rendezvous, run):
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine

    groups.start(run.parallel, rank=rank, processes=processes, rendezvous=rendezvous, device=torch.device("cpu"))
    engine = Engine(run, torch.device("cpu"))
    names = [name for name, param in engine.named_parameters() if getattr(param, "tensor_partial", False)]
    params = dict(engine.named_parameters())
    marked, plain = params["norm.weight"], params["embedding.weight"]
    marked.tensor_partial = True
    for param in params.values():
        param.grad = torch.full_like(param, rank + 1.0)
    engine._sum_partial_gradients()
    groups.stop()
    return names, float(marked.grad[0]), float(plain.grad.view(-1)[0])


@pytest.mark.parametrize("sequence", [False, True])
def test_partial_gradients_are_summed_over_tensor_parallel_ranks(sequence):
    """Of every marked parameter, with and without sequence parallelism, which marks the norms."""
    run = config(1, tensor=2, sequence=sequence)
    for rank, (names, marked, plain) in enumerate(run_processes(2, _partial, run)):
        assert bool(names) == sequence
        assert all("norm" in name for name in names)
        assert marked == 3.0
        assert plain == rank + 1.0
