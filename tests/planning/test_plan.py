"""The plan as a whole: what is extrapolated, counted and proposed, and the command line."""

import json
from pathlib import Path

import pytest

from armd_scale import config as configs
from armd_scale import config_files
from armd_scale.config import RunConfig
from armd_scale.model.flops import training_flops_per_token
from armd_scale.planning import measure
from armd_scale.planning.hardware import GPUS
from armd_scale.planning.plan import Planner, alternatives
from tests.conftest import BASELINES, MODERN, PAPER, run_processes, run_tool
from tests.planning import test_memory as memory

ROOT = Path(__file__).resolve().parents[2]
H100 = GPUS["h100"]


def on_gpus(model, processes=8, micro_batch=1, global_batch=64, **parallel):
    return RunConfig.model_validate(
        {
            "objective": model.objective,
            "model": model.model_dump(),
            "orders": {"ar_steps": 1, "permutation_steps": 1, "rho": 8},
            "train": {"steps": 10, "global_batch": global_batch, "micro_batch": micro_batch},
            "parallel": parallel,
            "cluster": {"tasks_per_node": processes, "gpus_per_node": processes},
        }
    )


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("first", "last"), [(0, 9), (0, 4), (1, 8), (5, 9)])
def test_a_run_of_layers_is_extrapolated(first, last, recompute):
    """Two layers of a kind tell what nine cost; but the moment of the peak can lie elsewhere in a longer run."""
    model = MODERN.model_copy(update={"layers": 9, "two_stream_layers": 4})
    config = on_gpus(model, tensor=2, sequence=True, recompute=recompute)
    [short] = measure.Meter(H100).stages(config, [first, last])
    with measure.fake_ranks(config):
        whole = measure.measure_stage(config, first, last, H100)
    for one, two in ((short, whole), (short.forward, whole.forward), (short.backward, whole.backward)):
        for name, value in vars(one).items():
            if isinstance(value, int | float):
                assert value == pytest.approx(vars(two)[name], rel=0.08 if name == "peak" else 1e-9), name


@pytest.mark.parametrize(
    "model",
    [PAPER, MODERN, PAPER.model_copy(update={"target_mlp": False}), BASELINES["ar"], BASELINES["mdm modern"]],
    ids=["paper", "modern", "without a target MLP", "ar", "mdm"],
)
@pytest.mark.parametrize("tensor", [1, 2])
def test_dispatched_flops_are_those_of_the_formula(model, tensor):
    """MFU's formula counts what PyTorch is really asked to multiply."""
    model = model.model_copy(update={"hidden": 256, "ffn": None, "length": 256, "vocab_size": 3000})
    config = on_gpus(model, tensor=tensor)
    [stage] = measure.Meter(H100).stages(config, [0, model.layers])
    counted = tensor * (stage.forward.flops + stage.backward.flops) / model.length
    assert counted == pytest.approx(training_flops_per_token(config.model), rel=0.03)


@pytest.mark.parametrize(
    "parallel", [{}, {"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "tensor": 2, "sequence": True}]
)
@pytest.mark.parametrize("model", [PAPER, MODERN], ids=["paper", "modern"])
def test_parameters_are_those_of_the_model(model, parallel):
    plan = Planner(H100).plan(on_gpus(model, **parallel))
    assert plan.parameters == run_processes(1, _parameters, model)[0]


def _parameters(rank, count, rendezvous, model):
    import torch

    from armd_scale.config import ParallelConfig
    from armd_scale.model.network import Stage
    from armd_scale.parallel import groups

    single = ParallelConfig()
    groups.start(single, rank=rank, processes=1, rendezvous=rendezvous, device=torch.device("cpu"))
    stage = Stage(model, groups.transformer_config(model, single, torch.float32))
    groups.stop()
    return sum(param.numel() for param in stage.parameters())


TRAFFIC = {
    "pipeline 2": {"pipeline": 2},
    "pipeline 2, cut early": {"pipeline": 2, "cut": [1]},
    "interleaved": {"pipeline": 2, "chunks": 2},
    "pipeline 4": {"pipeline": 4},
    "data 2": {"processes": 2},
    "data 2, zero 2": {"processes": 2, "zero": 2},
    "tensor 2, sequence": {"processes": 2, "tensor": 2, "sequence": True},
    "context 2, pipeline 2": {"processes": 4, "context": 2, "pipeline": 2},
}


@pytest.mark.parametrize("layout", TRAFFIC)
def test_traffic_is_what_real_ranks_send(layout):
    """Bytes of all messages of a step, by the kind of operation; those of a ring for collectives."""
    options = {"processes": TRAFFIC[layout].get("pipeline", 2), **TRAFFIC[layout]}
    config = memory.config(memory.STATES, dtype="bfloat16", **options)
    real = run_processes(config.cluster.processes, _sent, config)
    planned = Planner(GPUS["cpu"]).plan(config).traffic
    assert max(sent["send"] for sent in real) == planned["pipeline"]
    kinds = "tensor parallel", "context parallel", "data parallel", "tied embedding"
    collectives = sum(planned[name] for name in kinds)
    # The norm of the gradient and the log are a few bytes more.
    assert max(sent["ring"] for sent in real) == pytest.approx(collectives, rel=0.03, abs=10_000)


def _sent(rank, count, rendezvous, config):
    import numpy as np
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from armd_scale import orders
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine
    from armd_scale.rows import arrange

    passes = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "allgather_": 1, "reduce_": 1}
    sent = {"send": 0.0, "ring": 0.0}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket._qualified_op_name
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            floating = [t for t in tensors if t.dtype.is_floating_point]
            if name == "c10d::send":
                sent["send"] += sum(t.nbytes for t in floating)
            elif name.startswith("c10d::") and floating and name.removeprefix("c10d::") in passes:
                boxed = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject)]
                ranks = max(group.size() for group in map(_unboxed, boxed) if group is not None)
                size = max(t.nbytes for t in floating)
                sent["ring"] += passes[name.removeprefix("c10d::")] * size * (ranks - 1) / ranks
            return func(*args, **(kwargs or {}))

    device, length = torch.device("cpu"), config.model.length
    groups.start(config.parallel, rank=rank, processes=count, rendezvous=rendezvous, device=device)
    engine = Engine(config, device)
    tokens = np.zeros((config.train.micro_batch, length), dtype=np.int64)
    rows = [arrange(tokens, orders.left_to_right(length), 1) for _ in range(config.micro_batches)]
    with Watch():
        engine.train_step(rows, 1e-3)
    groups.stop()
    return sent


def _unboxed(leaf):
    from torch.distributed import ProcessGroup

    try:
        return ProcessGroup.unbox(leaf)
    except (RuntimeError, TypeError):
        return None  # the operation of a reduction


def test_alternatives_fit_and_keep_the_run():
    model = PAPER.model_copy(update={"hidden": 512, "length": 128})
    config = on_gpus(model, processes=2)
    planner = Planner(H100)
    found = list(alternatives(planner, config))
    assert {(plan.config.parallel.tensor, plan.config.parallel.pipeline) for plan in found} == {(1, 1), (2, 1), (1, 2)}
    for plan in found:
        assert plan.fits
        assert plan.config.model == config.model
        assert plan.config.train.global_batch == config.train.global_batch
        assert 0 < plan.mfu < 1
        assert 0 <= plan.bubble < 1


def test_more_costs_more():
    """Directions that any plan must have."""
    model = PAPER.model_copy(update={"hidden": 512, "length": 512, "layers": 8})
    planner = Planner(H100)
    base = planner.plan(on_gpus(model))
    full = planner.plan(on_gpus(model, recompute="full"))
    assert full.peak.activations < base.peak.activations
    assert full.step > base.step
    assert planner.plan(on_gpus(model, micro_batch=4)).peak.activations > 3 * base.peak.activations
    assert planner.plan(on_gpus(model, processes=4)).peak.optimizer == pytest.approx(2 * base.peak.optimizer)
    halves = planner.plan(on_gpus(model, tensor=2, sequence=True))
    assert halves.peak.weights == pytest.approx(base.peak.weights / 2, rel=0.01)
    assert halves.traffic["tensor parallel"] > base.traffic["tensor parallel"] == 0
    piped = planner.plan(on_gpus(model, pipeline=4))
    assert piped.bubble > 0
    assert piped.memory[0].activations > piped.memory[-1].activations


def tool(*words):
    return run_tool("tools/plan.py", *words)


@pytest.mark.parametrize("name", ["125m", "345m", "1b", "7b", "70b"])
def test_every_cluster_configuration_fits(name):
    config = config_files.load(ROOT / f"configs/{name}.yaml")
    config = configs.with_vocabulary(config, 50257, 50256)
    plan = Planner(H100).plan(config)
    assert plan.fits
    assert len(plan.memory) == config.parallel.pipeline


def test_the_command_line(tmp_path):
    """The layout of 70b, with a layer for each virtual stage: planning all 80 takes a minute on a busy machine."""
    layers = ("model.layers=16", "model.two_stream_layers=8")
    done = tool("--config", "configs/70b.yaml", "--alternatives", "0", "--json", tmp_path / "plan.json", *layers)
    assert done.returncode == 0, done.stderr
    assert "1024 x H100 SXM 80 GB on 128 nodes" in done.stdout
    assert "assumed, not measured" in done.stdout
    facts = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert facts["fits"] is True
    assert facts["config"]["cluster"]["nodes"] == 128


def test_the_command_line_says_what_does_not_fit():
    done = tool("--config", "configs/7b.yaml", "--nodes", "1", "--alternatives", "0", "parallel.pipeline=1",
                "parallel.chunks=1", "train.micro_batch=2")  # fmt: skip
    assert "DOES NOT FIT" in done.stdout


def test_the_command_line_without_gpus():
    done = tool("--config", "configs/tiny.yaml")
    assert "memory of a process" in done.stdout
    assert "tokens/s" not in done.stdout, "nothing is known about the speed of a CPU"


def test_bad_input_of_the_command_line():
    for words, message in (
        (("--config", "configs/7b.yaml", "--gpu", "b200"), "h100, h200"),
        (("--config", "configs/7b.yaml", "--nodes", "3"), "is not a multiple of"),
        (("--config", "configs/none.yaml"), "no configuration file"),
        (("--config", "configs/1b.yaml", "model.hidden=999999984", "model.heads=2"), "more bytes than"),
    ):
        done = tool(*words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
