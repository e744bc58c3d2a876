"""A run on a real Slurm, and what can befall it there: its losses and samples are those of a calm one."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest
from tests.launchers import slurm_cluster
from tests.launchers.test_main_job import ROOT, SMALL, text  # noqa: F401  (text is a fixture)

pytestmark = pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing()))
STEPS = 120


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def launch(slurm, config, *words, wait=True):
    process = subprocess.Popen(
        [sys.executable, "launchers/slurm.py", "--config", str(config), *map(str, words)], cwd=ROOT,
        env={**slurm.environment, "WANDB_MODE": "offline"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    if not wait:
        return process
    out, errors = process.communicate(timeout=240)
    return process.returncode, out, errors


def about(slurm, command, run, *words):
    done = subprocess.run(
        [sys.executable, "launchers/slurm.py", command, str(run), *words], cwd=ROOT, env=slurm.environment,
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def calm(slurm, tmp_path_factory, text):  # noqa: F811
    """From text to report on two nodes, the data prepared by an array of jobs; config file and run directory."""
    folder = tmp_path_factory.mktemp("calm")
    values = yaml.safe_load(SMALL.format(run_dir=folder / "run", text=text))
    values["data"] |= {"jobs": 2, "directory": str(folder / "data")}
    values["cluster"] = {"nodes": 2, "tasks_per_node": 2, "backoff_seconds": 0.0, "max_restarts": 9}
    values["train"] |= {
        "steps": STEPS, "checkpoint_every": 10, "eval_every": 1000, "hang_seconds": 4.0, "log_samples": True,
    }  # fmt: skip
    config = folder / "calm.yaml"
    config.write_text(yaml.safe_dump(values))
    code, out, errors = launch(slurm, config)
    assert code == 0, out + errors
    return config, folder / "run", out


def losses(run):
    return {record["step"]: record["loss"] for record in RunDirectory(run).metrics() if "loss" in record}


def samples(run):
    """Sample at each place of the sequence, as the ranks have written them down; the last writer of a step counts."""
    seen = {}
    for line in RunDirectory(run).sample_logs():
        seen |= {line["first"] + place: sample for place, (_, sample) in enumerate(line["ids"])}
    return seen


def test_the_chain_from_text_to_report(slurm, calm):
    config, run, out = calm
    for step in ("tokenise-begin", "tokenise-tokenise", "tokenise-finish", "train", "export", "evaluate"):
        assert f"\n{step}: " in out
    assert len(losses(run)) == STEPS + 2
    status = about(slurm, "status", run)
    assert status.count(" done") == 8
    assert f"step {STEPS + 2}/{STEPS + 2}" in status
    assert "4 processes: tensor 2 x data 2" in about(slurm, "logs", run)
    code, again, _ = launch(slurm, config)
    assert code == 0
    assert ": job " not in again, "the same command did something twice"
    script = next((run / "jobs/train").glob("*/*_submission.sh")).read_text()
    done = launch(slurm, config, "--dry-run", "--only", "train", "run_dir=" + str(run.with_name("other")))
    assert done[0] == 0, done[2]
    printed = done[1].partition("--- train\n")[2].strip()
    snapshot = next((run / "code").iterdir())
    for there, here in (("other/code/SNAPSHOT", f"run/code/{snapshot.name}"), ("/other", "/run")):
        printed = printed.replace(there, here)
    dependency = [line for line in script.splitlines() if "--dependency" in line or "kill-on-invalid-dep" in line]
    assert [line for line in script.strip().splitlines() if line not in dependency] == printed.splitlines()


@pytest.mark.timeout(900)
def test_everything_befalls_one_run(slurm, calm, tmp_path, request):
    """A rank is killed, one is stopped, time runs out, a node dies, the job is preempted, and cancelled for half the
    nodes: sample for sample and, on the same layout, bit for bit the calm run.
    """
    if not request.config.getoption("parity"):
        pytest.skip("three minutes: runs with make parity")
    config, quiet, _ = calm
    run = tmp_path / "run"
    process = launch(slurm, config, f"run_dir={run}", wait=False)
    deadline = time.monotonic() + 700
    reached = 0

    def wait_for(what, condition):
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come: {about(slurm, 'status', run)}"
            for job in _held(slurm):  # Slurm keeps a job that was queued again for two minutes
                slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            time.sleep(0.1)

    def goes_on():
        nonlocal reached
        wait_for("progress", lambda: max(losses(run), default=0) > reached + 12)
        reached = max(losses(run))

    def ranks():
        return [beat["pid"] for beat in RunDirectory(run).heartbeats()]

    goes_on()
    os.kill(ranks()[3], signal.SIGKILL)
    wait_for("the restart of a killed rank", lambda: len(RunDirectory(run).restarts()) == 1)
    goes_on()
    os.kill(ranks()[2], signal.SIGSTOP)
    wait_for("the restart after a hang", lambda: len(RunDirectory(run).restarts()) == 2)
    assert "a hang: no step finished" in RunDirectory(run).restarts()[1]["reason"]
    goes_on()
    job = _train_job(slurm)
    slurm.run("scancel", "--signal=USR2", job)  # what Slurm sends before the time limit
    wait_for("the job in the queue again", lambda: f"Restarts={1}" in slurm.run("scontrol", "show", "job", job))
    goes_on()
    slurm.kill_node(2)
    wait_for("the loss of a node", lambda: "Restarts=2" in slurm.run("scontrol", "show", "job", job))
    slurm.start_node(2)
    goes_on()
    slurm.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait_for("preemption", lambda: "Restarts=3" in slurm.run("scontrol", "show", "job", job))
    goes_on()
    found, expected = losses(run), losses(quiet)
    assert found == {step: expected[step] for step in range(1, max(found) + 1)}
    assert "ended: " in about(slurm, "cancel", run)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    before = losses(run)
    assert max(before) < STEPS, "the run was over before everything had befallen it"
    code, out, errors = launch(slurm, config, f"run_dir={run}", "cluster.nodes=1")
    assert code == 0, out + errors
    found = losses(run)
    assert sorted(found) == sorted(expected)
    assert all(abs(found[step] - expected[step]) < 1e-3 for step in expected)
    assert samples(run) == samples(quiet)
    for checkpoint in RunDirectory(run).complete_checkpoints():
        manifest.verify(checkpoint)


def _held(slurm):
    return slurm.run("squeue", "-h", "-t", "PENDING", "-o", "%i", check=False).split()


def _train_job(slurm):
    return slurm.run("squeue", "-h", "-t", "RUNNING", "-n", "small-train", "-o", "%i").split()[0]


def test_a_failed_stage_ends_the_chain(slurm, calm, tmp_path):
    """Bad input in a job: one line, exit code 2, nothing tried again, and the stages behind it do not start."""
    config, _, _ = calm
    run = tmp_path / "run"
    data = ("data.directory=null", "data.text=[/nowhere/*.txt]", "data.jobs=1")
    code, _, errors = launch(slurm, config, f"run_dir={run}", *data)
    assert code == 2
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: there is no text at /nowhere/*.txt: give files")
    assert [each["decision"][:6] for each in RunDirectory(run).restarts()] == ["stops:"]
    deadline = time.monotonic() + 60
    while slurm.run("squeue", "-h").strip() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not slurm.run("squeue", "-h").strip()
    assert not (run / "checkpoints").exists()
    with contextlib.suppress(FileNotFoundError):
        assert not list(Path(run / "jobs/train").glob("*/*_result.pkl"))
