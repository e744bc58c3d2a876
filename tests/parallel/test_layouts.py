"""Any layout gives the losses and the weights of one process; a layout repeated is bit-exact."""

import contextlib

import numpy as np
import pytest
import torch

from armd_scale import packing
from armd_scale.config import RunConfig
from armd_scale.objectives.interface import training
from armd_scale.rows import only
from tests.conftest import BASELINES, FEATURES, MODERN, PAPER, run_processes

STEPS = 4
# Large enough that Adam does not blow rounding up where a gradient is nearly zero.
EPS = 1e-4


def config(tensor=1, processes=1, model=PAPER, **changes):
    fields = {
        "seed": 5,
        "objective": model.objective,
        "model": model.model_dump(),
        "orders": {
            "ar_steps": 1,
            "permutation_steps": 2,
            "rho": 8,
            "strided_steps": 2,
            "streams": [2, 4],
            "drafts": 2 if model.adapter.rank else 0,
        },
        "optimizer": {"lr": 1e-2, "warmup_steps": 0, "eps": EPS, "weight_decay": 0.1, "clip": 0.5, "ema": 0.9},
        "train": {"steps": 2, "global_batch": 8, "micro_batch": 2, "dtype": "float32"},
        "data": {},
        "parallel": {"tensor": tensor},
        "cluster": {"tasks_per_node": processes},
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        fields[section][field] = value
    return RunConfig.model_validate(fields)


def train(rank, processes, rendezvous, run):
    """A few steps on fixed tokens; losses, gradient norms and the whole weights, on rank 0.

    With ``data.documents=separate``, every second step has documents and tokens that do not count.
    """
    from armd_scale.objectives.interface import training
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine
    from armd_scale.training import schedules

    device = torch.device("cpu")
    groups.start(run.parallel, rank=rank, processes=processes, rendezvous=rendezvous, device=device)
    engine = Engine(run, device)
    tokens = np.random.default_rng(1).integers(0, run.model.vocab_size, (STEPS, 8, 16))
    marks = np.random.default_rng(2).random((2, STEPS, 8, 16))
    starts, counted = packing.starts(marks[0] < 0.2), marks[1] < 0.8
    share = 8 // run.data_parallel
    losses, norms = [], []
    for step in range(STEPS):
        mine = range(engine.data_rank * share, (engine.data_rank + 1) * share)
        micro_batches = []
        for start in range(0, share, run.train.micro_batch):
            slots = mine[start : start + run.train.micro_batch]
            here, separate = (step, list(slots)), step % 2 and run.data.documents == "separate"
            rows = training(run.objective).rows(run, tokens[here], step, slots, starts[here] if separate else None)
            micro_batches.append(only(rows, counted[here], 0.8) if separate else rows)
        rate = schedules.learning_rate(step, run.optimizer, STEPS)
        result = engine.train_step(micro_batches, rate).result()
        losses.append(result.loss)
        norms.append(result.grad_norm)
    with engine.averaged_weights():
        averaged = _whole(engine)
    states = _whole(engine)
    groups.stop()
    return losses, norms, states, averaged


def _whole(engine):
    """All states of all parameters, gathered over the tensor-parallel ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from armd_scale.parallel.sharding import partition_dim

    engine.link_states()
    out = {}
    for name, param in engine.named_parameters():
        for state in engine.state_names:
            part = engine.read_state(param, state).contiguous()
            dim = partition_dim(param)
            if dim is not None:
                parts = [torch.empty_like(part) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
                dist.all_gather(parts, part, group=parallel_state.get_tensor_model_parallel_group())
                part = torch.cat(parts, dim=dim)
            out[f"{state}/{name}"] = part.clone()
        if partition_dim(param) is None and not hasattr(param, "ds_id"):  # whole on this rank
            out[f"working/{name}"] = param.detach().float().clone()
    return out


def start(run):
    """Train in the processes of a layout: rank 0's losses and norms, and the states of all stages."""
    results = run_processes(run.cluster.processes, train, run)
    assert all(result[:2] == results[0][:2] for result in results), "ranks disagree on the loss or the norm"
    merged = [{name: tensor for result in results for name, tensor in result[part].items()} for part in (2, 3)]
    return results[0][0], results[0][1], *merged


SMALL = [PAPER, MODERN, BASELINES["ar"], BASELINES["mdm"], BASELINES["card"], FEATURES]


@pytest.fixture(scope="module", params=SMALL, ids=["paper", "modern", "ar", "mdm", "card", "features"])
def reference(request):
    """One process, checked against plain AdamW on the same network in ``test_one_process_is_plain_adamw``."""
    return request.param, start(config(model=request.param, data__documents="separate"))


LAYOUTS = {
    "dp2": {"processes": 2},
    "tp2": {"tensor": 2, "processes": 2},
    "tp2 sp": {"tensor": 2, "processes": 2, "parallel__sequence": True},
    "tp4": {"tensor": 4, "processes": 4},
    "tp2 dp2": {"tensor": 2, "processes": 4},
    "tp2 dp2 sp": {"tensor": 2, "processes": 4, "parallel__sequence": True},
    "dp4": {"processes": 4},
    "tp4 dp2": {"tensor": 4, "processes": 8},
    "zero0 dp2": {"processes": 2, "parallel__zero": 0},
    "zero0 tp2 dp2 sp": {"tensor": 2, "processes": 4, "parallel__sequence": True, "parallel__zero": 0},
    "zero2 dp2": {"processes": 2, "parallel__zero": 2},
    "zero2 tp2 dp2 sp": {"tensor": 2, "processes": 4, "parallel__sequence": True, "parallel__zero": 2},
    "zero3 dp2": {"processes": 2, "parallel__zero": 3},
    "zero3 tp2 dp2": {"tensor": 2, "processes": 4, "parallel__zero": 3},
    "pp2": {"processes": 2, "parallel__pipeline": 2},
    "pp2 zero0": {"processes": 2, "parallel__pipeline": 2, "parallel__zero": 0},
    "pp3": {"processes": 3, "parallel__pipeline": 3},
    "pp2 dp2": {"processes": 4, "parallel__pipeline": 2},
    "pp2 tp2 sp": {"tensor": 2, "processes": 4, "parallel__sequence": True, "parallel__pipeline": 2},
    "pp2 tp2 dp2 sp recompute": {
        "tensor": 2,
        "processes": 8,
        "parallel__sequence": True,
        "parallel__pipeline": 2,
        "parallel__recompute": "full",
    },
    "pp4": {"processes": 4, "parallel__pipeline": 4},
    "pp2 interleaved": {"processes": 2, "parallel__pipeline": 2, "parallel__chunks": 2},
    "pp2 interleaved dp2": {"processes": 4, "parallel__pipeline": 2, "parallel__chunks": 2},
    "pp2 interleaved tp2 sp": {
        "tensor": 2,
        "processes": 4,
        "parallel__sequence": True,
        "parallel__pipeline": 2,
        "parallel__chunks": 2,
    },
    "context2": {"processes": 2, "parallel__context": 2},
    "context4": {"processes": 4, "parallel__context": 4},
    "context2 dp2 zero0": {"processes": 4, "parallel__context": 2, "parallel__zero": 0},
    "context2 dp2 zero2": {"processes": 4, "parallel__context": 2, "parallel__zero": 2},
    "context2 dp2 zero3": {"processes": 4, "parallel__context": 2, "parallel__zero": 3},
    "context2 tp2": {"tensor": 2, "processes": 4, "parallel__context": 2},
    "context2 tp2 sp": {"tensor": 2, "processes": 4, "parallel__sequence": True, "parallel__context": 2},
    "context2 pp2": {"processes": 4, "parallel__context": 2, "parallel__pipeline": 2},
    "context2 pp2 interleaved tp2 sp recompute": {
        "tensor": 2,
        "processes": 8,
        "parallel__sequence": True,
        "parallel__context": 2,
        "parallel__pipeline": 2,
        "parallel__chunks": 2,
        "parallel__recompute": "full",
    },
    "context4 zero3, logits in parts": {
        "processes": 4,
        "parallel__context": 4,
        "parallel__zero": 3,
        "train__head_batch": 1,
    },
    "recompute full": {"parallel__recompute": "full"},
    "recompute selective": {"parallel__recompute": "selective"},
    "zero3 recompute": {"processes": 2, "parallel__zero": 3, "parallel__recompute": "full"},
    "accumulation": {"train__micro_batch": 1},
    "no accumulation": {"train__micro_batch": 8},
    "logits in parts": {"train__micro_batch": 8, "train__head_batch": 3},
    "tp2 sp, logits in parts": {
        "tensor": 2,
        "processes": 2,
        "parallel__sequence": True,
        "train__head_batch": 1,
    },
    "zero3 dp2, logits in parts": {"processes": 2, "parallel__zero": 3, "train__head_batch": 1},
}


# Layouts of each model, unless the whole matrix is asked for.
TRIMMED = {
    id(PAPER): (
        "tp4", "zero0 tp2 dp2 sp", "zero2 dp2", "zero3 tp2 dp2", "pp4", "context4", "pp2 tp2 dp2 sp recompute",
        "pp2 interleaved dp2", "recompute selective", "zero3 recompute", "accumulation", "tp2 sp, logits in parts",
    ),
    id(MODERN): ("tp2 dp2 sp", "zero3 dp2", "pp3", "context2 tp2 sp"),
    id(BASELINES["ar"]): ("tp2 dp2 sp", "pp2 interleaved", "context2"),
    id(BASELINES["mdm"]): ("context2 pp2", "pp2 interleaved tp2 sp"),
    id(BASELINES["card"]): ("tp2 dp2 sp",),
    id(FEATURES): ("tp2 dp2 sp", "context2 dp2 zero3"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(reference, layout, request):
    model, (losses, norms, states, averaged) = reference
    if layout not in TRIMMED[id(model)] and not request.config.getoption("--parity"):
        pytest.skip("part of the whole matrix: make parity")
    if LAYOUTS[layout].get("tensor", 1) > model.key_heads:
        pytest.skip("this model has fewer key heads than tensor-parallel ranks")
    if LAYOUTS[layout].get("parallel__pipeline", 1) * LAYOUTS[layout].get("parallel__chunks", 1) > model.layers:
        pytest.skip("this model has fewer layers than runs of layers")
    run = config(model=model, data__documents="separate", **LAYOUTS[layout])
    got = start(run)
    np.testing.assert_allclose(got[0], losses, atol=2e-6)
    np.testing.assert_allclose(got[1], norms, rtol=2e-5)
    assert {name for name in states if "working" not in name} == {name for name in got[2] if "working" not in name}
    for expected, found in ((states, got[2]), (averaged, got[3])):
        for name in expected.keys() & found.keys():
            tensor = expected[name]
            torch.testing.assert_close(found[name], tensor, atol=3e-6, rtol=2e-5, msg=name)


@pytest.mark.parametrize("broken", ["states", "order"])
def test_a_broken_exchange_is_seen(broken, monkeypatch):
    """Context parallelism without the states of earlier chunks, and with the gathered rows in another order."""
    from armd_scale.model import context, prefix

    run = config(processes=2, parallel__context=2)
    losses = start(run)[0]
    if broken == "states":
        monkeypatch.setattr(prefix.PrefixAggregation, "_states_before", lambda *_: [None, None])
    else:
        finish = context.Gather.finish
        monkeypatch.setattr(context.Gather, "finish", lambda self: finish(self).roll(1, 0))
    assert np.abs(np.subtract(start(run)[0], losses)).max() > 1e-4


def test_one_process_is_plain_adamw():
    """The engine against torch.optim.AdamW, clip_grad_norm_ and a hand-written moving average on the same network."""
    run = config()
    losses, norms, states, averaged = start(run)
    expected = run_processes(1, _plain, run)[0]
    np.testing.assert_allclose(losses, expected[0], atol=1e-6)
    np.testing.assert_allclose(norms, expected[1], rtol=1e-5)
    for name, tensor in expected[2].items():
        torch.testing.assert_close(states[f"weight/{name}"], tensor, atol=2e-6, rtol=1e-5, msg=name)
        torch.testing.assert_close(averaged[f"weight/{name}"], expected[3][name], atol=2e-6, rtol=1e-5, msg=name)


def _plain(rank, processes, rendezvous, run):
    from armd_scale.model.network import Stage
    from armd_scale.objectives import armd
    from armd_scale.orders import Layout
    from armd_scale.parallel import groups
    from armd_scale.parallel.sharding import initialise
    from armd_scale.rows import arrange

    groups.start(run.parallel, rank=rank, processes=1, rendezvous=rendezvous, device=torch.device("cpu"))
    stage = Stage(run.model, groups.transformer_config(run.model, run.parallel, torch.float32))
    initialise([stage], run.seed)
    decayed = [p for p in stage.parameters() if p.dim() > 1]
    rest = [p for p in stage.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, eps=EPS
    )
    tokens = np.random.default_rng(1).integers(0, run.model.vocab_size, (STEPS, 8, 16))
    losses, norms, average = [], [], None
    for step in range(STEPS):
        layout = Layout(
            *(np.stack(f) for f in zip(*(armd.TRAINING.layout(step, j, run) for j in range(8)), strict=True))
        )
        loss = stage(arrange(tokens[step], layout, run.model.bos_id)).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(stage.parameters(), 0.5)))
        optimizer.step()
        losses.append(loss.item())
        now = {n: p.detach().clone() for n, p in stage.named_parameters()}
        decay = min(0.9, (2 + step) / (11 + step))
        average = now if average is None else {n: decay * average[n] + (1 - decay) * now[n] for n in now}
    groups.stop()
    return losses, norms, now, average


@pytest.mark.parametrize(
    "layout", [{}, {"tensor": 2, "processes": 2, "parallel__recompute": "full"}], ids=["one", "tp2"]
)
def test_fp8_follows_float32(layout):
    """Rounded as on a GPU: losses stay near the float32 ones, and are others."""
    losses, _, states, _ = start(config(train__fp8=True, **layout))
    expected = start(config())
    np.testing.assert_allclose(losses, expected[0], atol=0.1)
    assert np.abs(np.subtract(losses, expected[0])).min() > 1e-6
    moved = states["weight/norm.weight"] - expected[2]["weight/norm.weight"]
    assert 0 < float(moved.abs().max()) < 0.05


def _ask_nothing(rank, processes, rendezvous, run):
    """How many operations a step has, and how often it asks for the value of a tensor, or waits for all of them."""
    from unittest import mock

    from torch.utils._python_dispatch import TorchDispatchMode

    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket._qualified_op_name
            masked = name == "aten::index" and any(one is not None and one.dtype is torch.bool for one in args[1])
            if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select") or masked:
                asked.append(name)
            operations.append(name)
            return func(*args, **(kwargs or {}))

    def told(name, method):
        def ask(*args, **kwargs):
            asked.append(name)
            return method(*args, **kwargs)

        return ask

    groups.start(run.parallel, rank=rank, processes=processes, rendezvous=rendezvous, device=torch.device("cpu"))
    engine = Engine(run, torch.device("cpu"))
    share = 8 // run.data_parallel
    tokens = np.random.default_rng(1).integers(0, run.model.vocab_size, (8, 16))
    mine = range(engine.data_rank * share, (engine.data_rank + 1) * share)
    rows = training(run.objective).rows(run, tokens[list(mine)], 0, mine)
    micro_batches = [rows.map(lambda tensor: tensor[:2]), rows.map(lambda tensor: tensor[2:4])]
    engine.train_step(micro_batches, 1e-3)  # states are made
    operations, asked = [], []
    with contextlib.ExitStack() as stack:
        for name in ("tolist", "item", "cpu", "numpy"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, told(name, getattr(torch.Tensor, name))))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", told("synchronize", lambda *_: None)))
        with Watch():
            pending = engine.train_step(micro_batches, 1e-3, limit=50.0)
        during = list(asked)
        pending.result()
    assert len(asked) > len(during), "looking at the outcome is seen"
    groups.stop()
    return len(operations), during


@pytest.mark.parametrize(
    "layout",
    [
        {"parallel__zero": 0},
        {"processes": 2, "parallel__zero": 1},
        {"train__dtype": "bfloat16"},
        {"processes": 2, "parallel__zero": 2},
        {"processes": 2, "parallel__zero": 2, "train__dtype": "bfloat16"},
        {"processes": 2, "tensor": 2, "parallel__sequence": True, "train__dtype": "bfloat16"},
        {"processes": 2, "parallel__pipeline": 2, "train__dtype": "bfloat16"},
        {"processes": 2, "parallel__pipeline": 2, "parallel__chunks": 2},
    ],
    ids=["zero0", "zero1", "bf16", "zero2", "zero2 bf16", "tp2 sp bf16", "pp2 bf16", "pp2 interleaved"],
)
def test_a_step_asks_nothing_of_the_device(layout):
    """The host can run ahead: no value of a tensor is asked for between the data and the updated weights."""
    run = config(train__micro_batch=2, **layout)
    for operations, asked in run_processes(layout.get("processes", 1), _ask_nothing, run):
        assert operations > 300
        assert asked == []


def test_a_layout_repeated_is_bit_exact():
    run = config(tensor=2, processes=4)
    first, second = (run_processes(4, train, run)[0] for _ in range(2))
    assert first[:2] == second[:2]
    for name, tensor in first[2].items():
        assert torch.equal(tensor, second[2][name]), name


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"processes": 2},
        {"tensor": 2, "processes": 4},
        {"processes": 2, "parallel__pipeline": 2},
        {"processes": 2, "parallel__zero": 2},
        {"processes": 2, "parallel__zero": 3},
        {"tensor": 2, "processes": 2, "parallel__sequence": True, "parallel__recompute": "full"},
        {"processes": 2, "parallel__pipeline": 2, "parallel__chunks": 1, "train__micro_batch": 1},
    ],
    ids=["one", "dp2", "tp2 dp2", "pp2", "zero2", "zero3", "tp2 sp recompute", "pp2 accumulation"],
)
def test_bfloat16_follows_float32(reference, layout, request):
    """Float32 master weights and gradient sums: bf16 losses stay within its rounding of the float32 ones."""
    model, (losses, *_) = reference
    if model is not PAPER and layout and not request.config.getoption("--parity"):
        pytest.skip("part of the whole matrix: make parity")
    run = config(model=model, train__dtype="bfloat16", data__documents="separate", **layout)
    got = start(run)
    np.testing.assert_allclose(got[0], losses, atol=0.05)
    working = got[2].get("working/norm.weight")  # with ZeRO-3 no rank has it whole
    assert working is None or torch.equal(working, working.bfloat16().float())
    assert not torch.equal(got[2]["weight/norm.weight"], got[2]["weight/norm.weight"].bfloat16().float())


def test_initial_weights_do_not_depend_on_the_layout():
    whole = run_processes(1, _initial, config())[0]
    parts = run_processes(2, _initial, config(tensor=2, processes=2))
    for name, tensor in whole.items():
        dim = next((d for d in range(tensor.dim()) if parts[0][name].shape[d] != tensor.shape[d]), None)
        joined = parts[0][name] if dim is None else torch.cat([parts[0][name], parts[1][name]], dim)
        assert torch.equal(joined, tensor), name


def _initial(rank, processes, rendezvous, run):
    from armd_scale.model.network import Stage
    from armd_scale.parallel import groups
    from armd_scale.parallel.sharding import initialise

    groups.start(run.parallel, rank=rank, processes=processes, rendezvous=rendezvous, device=torch.device("cpu"))
    stage = Stage(run.model, groups.transformer_config(run.model, run.parallel, torch.float32))
    initialise([stage], 0)
    groups.stop()
    return {name: param.detach().clone() for name, param in stage.named_parameters()}
