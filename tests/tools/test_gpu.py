"""``tools/gpu.py`` and ``tools/bench.py train`` at toy sizes: what they find out on a CPU, and all of it on a GPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from armd_scale.config import ModelConfig
from armd_scale.model.flops import training_flops_per_token
from tests.conftest import ROOT, run_processes, run_tool


def tool(name):
    sys.path.insert(0, str(ROOT / "tools"))  # as where it is the script that runs
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _correctness(rank, processes, rendezvous):
    gpu = tool("gpu")
    return gpu._correctness("cpu", "float32", gpu._passes("cpu", "float32"))


def test_correctness_is_found_out():
    rows = run_processes(1, _correctness)[0]
    assert len(rows) == 16
    for row in rows:
        assert row["right"], row
        assert row["difference"] < 1e-5
    assert {row["what"].split(",")[1].split()[0] for row in rows} == {"armd", "ar", "mdm"}


def _broken(rank, processes, rendezvous):
    from armd_scale.model import layers

    gpu = tool("gpu")
    exact, reference = layers._rotated, gpu._passes("cpu", "float32")
    layers._rotated = lambda x, cos, sin: exact(x, sin, cos)
    return gpu._correctness("cpu", "float32", reference)


def test_an_error_is_found_out():
    wrong = [row["what"] for row in run_processes(1, _broken)[0] if not row["right"]]
    assert len(wrong) == 14, "all losses and gradients; texts are of the standalone model alone"


def _loss_of_layouts(rank, processes, rendezvous, run, folder):
    tool("gpu")._losses(rank, "cpu", run, folder)


def test_two_processes_train_as_one(tmp_path):
    """What a GPU is asked to do over gloo, here by two processes on a CPU."""
    gpu, found = tool("gpu"), []
    for number, (processes, parallel) in enumerate(((1, {}), (2, {}), (2, {"tensor": 2}))):
        folder = tmp_path / str(number)
        folder.mkdir()
        run_processes(processes, _loss_of_layouts, gpu._toy_run(processes, **parallel), str(folder))
        found.append(json.loads((folder / "losses.json").read_text()))
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


def test_targets_are_compared():
    rows = [
        {"kind": kind, "seconds": seconds, "flops": 1e12, "memory": 10.5e9, "planned": 10e9}
        for kind, seconds in (("AR", 2.0), ("ARMD", 2.5), ("ARMD, strided, S = 4", 2.6))
    ]
    for row in rows:
        row["ratio"] = row["seconds"] / 2.0
    train = {"rows": rows, "limit": {"peak": 1e12, "flops": 8e11}}
    texts = {"transformers GPT-2": {"tokens_per_second": 10.0, "seconds": 9.0}}
    texts |= {f"armd_scale S = {s}": {"tokens_per_second": 30.0 * s, "seconds": 0.4 / s} for s in (1, 4)}
    timings = {"train small": train, "train large": train, "decode": {"batch 1": texts, "batch 64": texts}}
    found = {row["what"]: (row["measured"], row["met"]) for row in tool("gpu")._targets(timings)}
    expected = [
        (1.25, False), (0.4, False), (0.5, False), (1.04, True), (0.4, True), (0.1, True), (12.0, True), (0.05, True),
    ]  # fmt: skip
    for (value, met), (wanted, verdict) in zip(found.values(), expected, strict=True):
        assert value == pytest.approx(wanted)
        assert met is verdict


SIZES = {
    "layers": 2, "hidden": 64, "vocab": 500, "length": 32, "batch": 2, "device": "cpu", "dtype": "float32",
    "norm": "rmsnorm", "mlp": "swiglu", "recompute": "none", "fp8": False, "streams": 1,
}  # fmt: skip


def _planned(rank, processes, rendezvous):
    return tool("benchmarks/train").planned(
        "NVIDIA H100 80GB HBM3", 1, **{**SIZES, "device": "cuda", "objective": "armd"}
    )


def test_memory_is_planned_apart():
    """What ``bench.py`` asks another process for, which sees no GPU."""
    assert 1e6 < run_processes(1, _planned)[0] < 1e8


def _step(rank, processes, rendezvous, kind, trace):
    bench = tool("benchmarks/train")
    return bench.armd_scale(
        steps=2, threads=1, trace=trace, **{**SIZES, **kind},
    )  # fmt: skip


@pytest.mark.parametrize("kind", [{"objective": "ar"}, {"objective": "armd", "streams": 4}, {"objective": "mdm"}])
def test_a_step_is_timed(kind, tmp_path):
    trace = str(tmp_path / "trace.json")
    row = run_processes(1, _step, kind, trace)[0]
    assert 0 < row["seconds"] < 60
    shape = {"layers": 2, "hidden": 64, "heads": 1, "length": 32, "norm": "rmsnorm", "mlp": "swiglu"}
    model = ModelConfig(**shape, vocab_size=500, bos_id=0, objective=kind["objective"])
    assert row["flops"] == training_flops_per_token(model) * 64
    assert any("mm" in one["name"] for one in row["profile"])
    assert "traceEvents" in json.loads(Path(trace).read_text())


def test_bad_words_are_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    records = [{"step": step, "loss": 5.0 - step, "phase": "x", "grad_norm": None} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = run_tool("tools/curves.py", "--out", tmp_path / "x.png", f"a={run}", f"b={run},{run}")
    assert "b: step 2, loss 3.0000 (+0.0000 to the first line), 2 runs, 3.0000 to 3.0000" in done.stdout
    assert (tmp_path / "x.png").stat().st_size > 1000
    for words, line in (
        (["tools/gpu.py", "--wheels", tmp_path, "--device", "cpu"], "there are no wheels in"),
        (["tools/bench.py", "train", "--hidden", 65], "--hidden must be a multiple of 64"),
        (["tools/bench.py", "train", "--fp8", "--length", 24], "multiples of 16, but model.length = 24"),
        (["tools/bench.py", "train", "--length", 8, 16, "--plot", tmp_path / "x.foo"], "pictures are .png, .pdf, .svg"),
        (
            ["tools/plan.py", "--config", "configs/125m.yaml", "--along", "parallel.recompute=none,full"],
            "wants numbers",
        ),
        (["tools/plan.py", "--config", "configs/125m.yaml", "--along", "model.length=8,16", "train.seed=1"], "as many"),
        (["tools/curves.py", "--out", tmp_path / "x.png", "a"], "is not NAME=RUN"),
        (["tools/curves.py", "--out", tmp_path / "x.png", f"a={tmp_path}"], "has no metrics.jsonl"),
        (["tools/curves.py", "--out", tmp_path / "x.png", f"a={run}", f"a={run}"], "there are two lines 'a'"),
        (["tools/curves.py", "--out", tmp_path / "x.png", "--figure", "phase", f"a={run}"], "has a number 'phase'"),
        (["tools/bench.py", "train", "--plot", tmp_path / "x.png"], "give several values of one of"),
        (["tools/bench.py", "train", "--length", 8, 16, "--batch", 1, 2], "give several values of one of"),
    ):
        done = run_tool(*words)
        assert done.returncode == 2
        assert line in done.stderr
    if not torch.cuda.is_available():
        done = run_tool("tools/gpu.py")
        assert done.returncode == 2
        assert "there is no GPU here" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_everything_on_a_gpu(tmp_path):
    out = tmp_path / "gpu.json"
    words = [sys.executable, ROOT / "tools" / "gpu.py", "--quick", "--json", out]
    assert subprocess.run(list(map(str, words)), check=False).returncode == 0
    facts = json.loads(out.read_text())
    assert all(row["right"] for row in facts["correctness"])
    assert facts["waits"] == "no"
    assert len(facts["targets"]) == 8
