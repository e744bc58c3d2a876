"""The plan as a whole: what is extrapolated, counted and proposed, and the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from armd_scale import config as configs
from armd_scale.config import RunConfig
from armd_scale.model.flops import training_flops_per_token
from armd_scale.planning import measure
from armd_scale.planning.hardware import GPUS
from armd_scale.planning.plan import Planner, alternatives
from tests.conftest import MODERN, PAPER, run_processes

ROOT = Path(__file__).resolve().parents[2]
H100 = GPUS["h100"]


def on_gpus(model, processes=8, micro_batch=1, global_batch=64, **parallel):
    return RunConfig.model_validate(
        {
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
    [short] = measure.Meter(H100).chunks(config, [first, last])
    with measure.fake_ranks(config):
        whole = measure.run(config, first, last, H100)
    for one, two in ((short, whole), (short.forward, whole.forward), (short.backward, whole.backward)):
        for name, value in vars(one).items():
            if isinstance(value, int | float):
                assert value == pytest.approx(vars(two)[name], rel=0.05 if name == "peak" else 1e-9), name


@pytest.mark.parametrize("model", [PAPER, MODERN], ids=["paper", "modern"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_dispatched_flops_are_those_of_the_formula(model, tensor):
    """MFU's formula counts what PyTorch is really asked to multiply."""
    model = model.model_copy(update={"hidden": 256, "ffn": None, "length": 256, "vocab_size": 3000})
    config = on_gpus(model, tensor=tensor)
    [chunk] = measure.Meter(H100).chunks(config, [0, model.layers])
    counted = tensor * (chunk.forward.flops + chunk.backward.flops) / model.length
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
    return subprocess.run(
        [sys.executable, "tools/plan.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", ["125m", "345m", "1b", "7b", "70b"])
def test_every_cluster_configuration_fits(name):
    config = configs.load(ROOT / f"configs/{name}.yaml")
    config = configs.with_vocabulary(config, 50257, 50256)
    plan = Planner(H100).plan(config)
    assert plan.fits
    assert len(plan.memory) == config.parallel.pipeline


def test_the_command_line(tmp_path):
    done = tool("--config", "configs/70b.yaml", "--alternatives", "0", "--json", str(tmp_path / "plan.json"))
    assert done.returncode == 0, done.stderr
    assert "1024 x H100 SXM 80 GB on 128 nodes" in done.stdout
    assert "assumed, not measured" in done.stdout
    facts = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert facts["fits"] is True
    assert facts["config"]["cluster"]["nodes"] == 128
    small = tool("--config", "configs/7b.yaml", "--nodes", "1", "--alternatives", "0", "parallel.tensor=1",
                 "parallel.sequence=false")  # fmt: skip
    assert "DOES NOT FIT" in small.stdout
    processes = tool("--config", "configs/tiny.yaml")
    assert "memory of a process" in processes.stdout
    assert "tokens/s" not in processes.stdout, "nothing is known about the speed of a CPU"


def test_bad_input_of_the_command_line():
    for words, message in (
        (("--config", "configs/7b.yaml", "--gpu", "b200"), "no figures are known for the GPU 'b200'; known: h100"),
        (("--config", "configs/7b.yaml", "--nodes", "3"), "is not a multiple of"),
        (("--config", "configs/none.yaml"), "there is no configuration file"),
    ):
        done = tool(*words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
