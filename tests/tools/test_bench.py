"""``armd bench train`` at toy sizes, and the command lines of ``bench``, ``plan`` and ``curves``."""

import inspect
import json
import re
from pathlib import Path

import pytest

from armd_scale.benchmarks import decode, gpu_correctness, train
from armd_scale.config import ModelConfig
from armd_scale.model.flops import training_flops_per_token
from data_pipeline import benchmark
from tests.conftest import run_processes, run_tool

SIZES = {
    "layers": 2, "hidden": 64, "vocab": 500, "length": 32, "batch": 2, "device": "cpu", "dtype": "float32",
    "norm": "rmsnorm", "mlp": "swiglu", "recompute": "none", "fp8": False, "streams": 1,
}  # fmt: skip


def _planned(rank, processes, rendezvous):
    return train.planned("NVIDIA H100 80GB HBM3", 1, **{**SIZES, "device": "cuda", "objective": "armd"})


def test_memory_is_planned_apart():
    """What ``bench.py`` asks another process for, which sees no GPU."""
    assert 1e6 < run_processes(1, _planned)[0] < 1e8


def _step(rank, processes, rendezvous, kind, trace):
    return train.armd_scale(
        steps=2, threads=1, trace=trace, **{**SIZES, **kind},
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        {"objective": "ar"},
        {"objective": "armd", "streams": 4},
        {"objective": "armd", "documents": 4},
        {"objective": "mdm"},
    ],
)
def test_a_step_is_timed(kind, tmp_path):
    trace = str(tmp_path / "trace.json")
    row = run_processes(1, _step, kind, trace)[0]
    assert 0 < row["seconds"] < 60
    shape = {"layers": 2, "hidden": 64, "heads": 1, "length": 32, "norm": "rmsnorm", "mlp": "swiglu"}
    model = ModelConfig(**shape, vocab_size=500, bos_id=0, objective=kind["objective"])
    assert row["flops"] == training_flops_per_token(model) * 64
    assert any("mm" in operation["name"] for operation in row["profile"])
    assert "traceEvents" in json.loads(Path(trace).read_text())


@pytest.mark.parametrize("module", [decode, gpu_correctness, train, benchmark], ids=lambda module: module.__name__)
def test_measurements_in_other_processes_exist(module):
    """``run_in_process`` finds a function by the name of its module and its own."""
    source = inspect.getsource(module)
    names = re.findall(r"\{__name__\}\.(\w+)\"", source)
    assert names
    assert all(callable(getattr(module, name)) for name in names)
    assert not re.search(r"run_in_process\(\s*\"", source), "a name without its module"


@pytest.fixture(scope="module")
def curve_run(tmp_path_factory):
    """The directory of a run with the metrics of two steps."""
    run = tmp_path_factory.mktemp("curves") / "run"
    run.mkdir()
    records = [{"step": step, "loss": 5.0 - step, "phase": "x", "grad_norm": None} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def test_curves_are_drawn(curve_run, tmp_path):
    done = run_tool("tools/curves.py", "--out", tmp_path / "x.png", f"a={curve_run}", f"b={curve_run},{curve_run}")
    assert "b: step 2, loss 3.0000 (+0.0000 to the first line), 2 runs, 3.0000 to 3.0000" in done.stdout
    assert (tmp_path / "x.png").stat().st_size > 1000


BENCH = ["tools/bench.py", "train"]
PLAN = ["tools/plan.py", "--config", "configs/125m.yaml", "--along"]
CURVES = ["tools/curves.py", "--out", "{tmp}/x.png"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        pytest.param([*BENCH, "--hidden", 65], "--hidden", id="bench-odd-width"),
        pytest.param([*BENCH, "--fp8", "--length", 24], "model.length = 24", id="bench-fp8-length"),
        pytest.param([*BENCH, "--length", 8, 16, "--plot", "{tmp}/x.foo"], ".png, .pdf, .svg", id="bench-picture-type"),
        pytest.param([*BENCH, "--plot", "{tmp}/x.png"], "several values of", id="bench-plot-of-one-value"),
        pytest.param([*BENCH, "--length", 8, 16, "--batch", 1, 2], "several values of", id="bench-two-ranges"),
        pytest.param([*PLAN, "parallel.recompute=none,full"], "wants numbers", id="plan-along-words"),
        pytest.param([*PLAN, "model.length=8,16", "train.seed=1"], "as many", id="plan-unequal-counts"),
        pytest.param([*CURVES, "a"], "is not NAME=RUN", id="curves-no-run"),
        pytest.param([*CURVES, "a={tmp}"], "has no metrics.jsonl", id="curves-no-metrics"),
        pytest.param([*CURVES, "a={run}", "a={run}"], "'a'", id="curves-one-name-twice"),
        pytest.param([*CURVES, "--figure", "phase", "a={run}"], "has a number 'phase'", id="curves-figure-of-words"),
    ],
)
def test_bad_words_are_refused(curve_run, tmp_path, words, line):
    done = run_tool(*(str(word).format(tmp=tmp_path, run=curve_run) for word in words))
    assert done.returncode == 2
    assert line in done.stderr
