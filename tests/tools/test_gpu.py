"""``tools/gpu.py`` at toy sizes on a CPU, and all of it on a GPU."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from armd_scale.benchmarks import gpu_correctness, gpu_report, registry
from armd_scale.benchmarks.registry import Context, Figure, Measurement, Runner
from tests.conftest import ROOT, run_processes


def _compare(rank, processes, rendezvous):
    reference = gpu_correctness.cpu_gradients()
    return [*gpu_correctness.compare("cpu", "float32", reference), *gpu_correctness.texts("cpu")]


def test_correct_results_pass():
    figures = run_processes(1, _compare)[0]
    assert len(figures) == 20
    for figure in figures:
        assert figure.passed, figure
        assert figure.value < 1e-5
    assert {figure.name.split(",")[1].split()[0] for figure in figures} == {"armd", "ar", "mdm"}


def _compare_broken(rank, processes, rendezvous):
    from armd_scale import formulas

    exact, reference = formulas.rotate, gpu_correctness.cpu_gradients()
    formulas.rotate = lambda x, cos, sin: exact(x, sin, cos)  # the standalone model has its own name for the function
    return list(gpu_correctness.compare("cpu", "float32", reference))


def test_wrong_results_fail():
    figures = run_processes(1, _compare_broken)[0]
    assert len(figures) == 18
    assert not any(figure.passed for figure in figures)


def _compare_failing(rank, processes, rendezvous):
    from armd_scale.model.network import Stage

    exact, reference = Stage.forward, gpu_correctness.cpu_gradients()

    def forward(stage, rows, *args, **kwargs):
        if stage.model_config.objective == "ar":
            raise RuntimeError("no such kernel")
        return exact(stage, rows, *args, **kwargs)

    Stage.forward = forward
    return list(gpu_correctness.compare("cpu", "float32", reference))


def test_a_case_that_fails_leaves_the_others():
    failed = [figure for figure in run_processes(1, _compare_failing)[0] if not figure.passed]
    assert [figure.name for figure in failed] == ["loss, ar, float32"]
    assert "no such kernel" in failed[0].detail["error"]
    assert failed[0].record()["value"] is None


def _losses(rank, processes, rendezvous, run, folder):
    gpu_correctness._losses(rank, "cpu", run, folder)


def test_two_processes_train_as_one(tmp_path):
    """What a GPU is asked to do over gloo, here by two processes on a CPU."""
    found = []
    for number, (processes, parallel) in enumerate(((1, {}), (2, {}), (2, {"tensor": 2}))):
        folder = tmp_path / str(number)
        folder.mkdir()
        run_processes(processes, _losses, gpu_correctness.toy_run(processes, **parallel), str(folder))
        found.append(json.loads((folder / "losses.json").read_text()))
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


MODULE = '''
import os, signal, subprocess, sys, time
from armd_scale.benchmarks.registry import Figure, measurement

@measurement("good", worth=9, seconds=1, quick_seconds=1, checks_results=True)
def good(context):
    """Two figures"""
    yield Figure("small", 1.0, "s", 2.0)
    yield Figure("large", 3.0, "s", 2.0)

@measurement("failing", worth=8, seconds=1, quick_seconds=1)
def failing(context):
    yield Figure("before", 1.0)
    raise RuntimeError("not on this device")

@measurement("killed", worth=7, seconds=1, quick_seconds=1)
def killed(context):
    yield Figure("before", 1.0)
    os.kill(os.getpid(), signal.SIGKILL)

@measurement("slow", worth=6, seconds=0.2, quick_seconds=0.2)
def slow(context):
    yield Figure("before", 1.0)
    subprocess.run([sys.executable, "-c", "import time; time.sleep(99)"])

@measurement("never", worth=5, seconds=1000, quick_seconds=1000)
def never(context):
    yield Figure("x", 1.0)

@measurement("gpu", worth=4, seconds=1, quick_seconds=1, needs_gpu=True)
def gpu(context):
    yield Figure("x", 1.0)

@measurement("last", worth=3, seconds=1, quick_seconds=1)
def last(context):
    yield Figure("after", 5.0, limit=1.0)
'''


def test_a_measurement_does_not_affect_the_next(tmp_path):
    (tmp_path / "toy_measurements.py").write_text(MODULE)
    (tmp_path / "run.py").write_text(
        "from pathlib import Path\n"
        "import toy_measurements\n"
        "from armd_scale.benchmarks import registry\n"
        "registry.Runner.SMALLEST_LIMIT = 8.0\n"
        "runner = registry.Runner(registry.Context('cpu', True, '.'), Path('out.json'), 300, {})\n"
        "runner.run(registry.MEASUREMENTS.values())\n"
        "print('wrong:', runner.wrong())\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    entries = json.loads((tmp_path / "out.json").read_text())["measurements"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "good": "done",
        "failing": "failed",
        "killed": "failed",
        "slow": "too slow",
        "never": "skipped",
        "gpu": "skipped",
        "last": "done",
    }
    assert [figure["passed"] for figure in entries["good"]["figures"]] == [True, False]
    for name in ("failing", "killed", "slow"):
        assert [figure["name"] for figure in entries[name]["figures"]] == ["before"]
    assert "not on this device" in entries["failing"]["reason"]
    assert "1000 s" in entries["never"]["reason"]
    assert entries["last"]["figures"][0]["passed"] is None, "targets are those of full sizes"
    assert "wrong: ['large']" in done.stdout
    assert "WRONG" in done.stdout


def test_figures_survive_a_kill(tmp_path):
    """Killed at a random moment after the first figure, the results file holds the figures that were printed."""
    path, log = tmp_path / "gpu.json", tmp_path / "log"
    words = [sys.executable, ROOT / "tools/gpu.py", "--device", "cpu", "--quick", "--seconds", "120", "--json", path]
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, words)), stdout=out, stderr=subprocess.STDOUT)
    while "loss, armd left to right" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    time.sleep(random.uniform(0, 1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    figures = json.loads(path.read_text())["measurements"]["correctness-float32"]["figures"]
    printed = [line for line in log.read_text().splitlines() if line.endswith(" ok")]
    assert len(figures) >= len(printed) >= 1


def _entry(worth, seconds):
    return Measurement(f"m{worth}", worth, seconds, seconds, False, False, lambda context: iter(()))


def test_order_and_sum():
    lines = registry.schedule_table([_entry(1, 30), _entry(3, 10), _entry(2, 20)], quick=False, budget=40).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["m3", "m2", "m1"]
    assert [line.split()[2] for line in lines[1:]] == ["10", "30", "60"]
    assert ["over budget" in line for line in lines[1:]] == [False, False, True]


def test_all_measurements_fit_one_call():
    measurements = registry.load().values()
    assert sum(m.seconds for m in measurements) <= 540
    assert [m.name for m in registry.ordered(measurements)][:2] == ["correctness-float32", "correctness-bfloat16"]
    assert all(m.summary for m in measurements)


def test_names_are_unique():
    with pytest.raises(ValueError, match="two measurements"):
        registry.measurement("attention", worth=1, seconds=1, quick_seconds=1)(lambda context: iter(()))


@pytest.mark.parametrize(
    ("value", "limit", "sign", "passed"),
    [
        (1, 2, "<=", True),
        (3, 2, "<=", False),
        (3, 2, ">=", True),
        (1, None, "<=", None),
        (float("nan"), 2, "<=", False),
    ],
)
def test_limits(value, limit, sign, passed):
    assert Figure("x", value, "", limit, sign).passed is passed


def test_the_results_page_is_generated():
    page = (ROOT / "docs/results/performance.md").read_text()
    assert page == gpu_report.page(gpu_report.results(ROOT / "docs/results/gpu"))


def test_figures_reach_the_page(tmp_path):
    (tmp_path / "gpu").mkdir()
    runner = Runner(
        Context("cuda", False, "."), tmp_path / "gpu" / "h100-a.json", None,
        {"environment": {"GPU": "NVIDIA H100", "torch": "2.11"}, "date": "2026-01-01", "commit": "abc", "quick": False},
    )  # fmt: skip
    record = Figure("ARMD / AR step time, 125M", 1.25, "times", 1.20).record()
    runner.results["measurements"]["train-125m"] = {"status": "too slow", "reason": "stopped", "figures": [record]}
    runner._write()
    gpu_report.write(tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "| ARMD / AR step time, 125M | <= 1.2 | 1.25 times ✗ |" in page
    assert "h100-a: too slow (stopped)" in page
    assert page.count("Not measured.") == len(registry.MEASUREMENTS) - 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--wheels", "{tmp}", "--device", "cpu"], "no wheels in"),
        (["--only", "nothing", "--device", "cpu"], "'nothing'"),
        (["--seconds", "0"], "--seconds must be positive"),
        (["--report", "{tmp}/none"], "is not a directory"),
        (["--report", "{tmp}"], "not a results file"),
        (["--device", "cpu", "--quick", "--json", "{tmp}/none/x.json"], "cannot be written"),
        *([] if torch.cuda.is_available() else [(["--seconds", "9"], "no GPU")]),
    ],
)
def test_bad_words_are_refused(tmp_path, words, line):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "x.json").write_text("{")
    command = [sys.executable, ROOT / "tools/gpu.py", *(word.format(tmp=tmp_path) for word in words)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert line in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_everything_on_a_gpu(tmp_path):
    out = tmp_path / "gpu.json"
    words = [sys.executable, ROOT / "tools" / "gpu.py", "--quick", "--json", out]
    assert subprocess.run(list(map(str, words)), check=False).returncode == 0
    facts = json.loads(out.read_text())
    assert {entry["status"] for entry in facts["measurements"].values()} == {"done"}
