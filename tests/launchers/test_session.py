"""A launcher inside a session of Slurm: which executor runs a job is handed over, never read from the environment."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from armd_scale import logs
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.training import health, loop
from launchers import jobs, restart, stages
from launchers.stages import Submission
from tests.conftest import run_armd

SESSION = {
    "SLURM_JOB_ID": "777",
    "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.1",  # of nobody (RFC 5737)
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
}
RANK_1 = {
    "SUBMITIT_LOCAL_JOB_ID": "55", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
}  # fmt: skip


@pytest.fixture
def session(monkeypatch):
    for name, value in {**SESSION, **RANK_1, "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def config(tmp_path):
    return RunConfig.model_validate({"run_dir": str(tmp_path / "run"), "cluster": {"tasks_per_node": 2}})


@pytest.fixture
def started(monkeypatch):
    """What the training loop was called with, in place of a training; it ends with the flag that is set here."""
    calls = {"flag": 0}

    def train(config, rank, processes, local_rank, rendezvous):
        calls.update(rank=rank, processes=processes, local_rank=local_rank, rendezvous=rendezvous)
        return calls["flag"]

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(stages, "die_with_parent", lambda parent: calls.update(parent=parent))
    monkeypatch.setattr(restart, "requeue", lambda: calls.update(requeued=True))
    monkeypatch.setattr(restart, "hold", lambda: None)
    monkeypatch.setattr(logs, "configure", lambda rank: None)
    return calls


@pytest.mark.parametrize(
    ("executor", "rank", "processes", "rendezvous"),
    [
        ("local", 1, 2, "{run}/jobs/rendezvous-word"),
        ("debug", 0, 1, "{run}/jobs/rendezvous-word"),
        ("slurm", 3, 4, "tcp://192.0.2.1:20777"),
    ],
)
def test_the_launcher_says_what_runs_a_job(session, config, started, executor, rank, processes, rendezvous):
    assert stages.run("train", config, Submission(executor, "word")) == {}
    assert (started["rank"], started["local_rank"], started["processes"]) == (rank, rank, processes)
    assert started["rendezvous"] == rendezvous.format(run=config.directory)
    assert started.get("parent") == (55 if executor == "local" else None)


@pytest.mark.parametrize(("executor", "requeued"), [("local", False), ("debug", False), ("slurm", True)])
def test_only_a_job_of_slurm_is_requeued(session, config, started, monkeypatch, executor, requeued):
    monkeypatch.setenv("SLURM_PROCID", "0")
    config.directory.mkdir()
    started["flag"] = health.REQUEUE
    with pytest.raises(UserError, match="the state is saved"):
        stages.run("train", config, Submission(executor, "word"))
    assert started.get("requeued", False) == requeued
    assert bool(config.run_directory.restarts()) == requeued


def test_what_is_submitted_forgets_the_session(session, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    jobs._leave_job()
    left = {name: value for name, value in os.environ.items() if name.startswith(("SLURM", "SUBMITIT", "SBATCH"))}
    assert left == {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine"}


@pytest.mark.parametrize(
    ("listed", "count", "devices"),
    [
        (None, 2, ["0", "1"]),
        ("2,3", 2, ["2", "3"]),
        ("5, 3,1", 2, ["5", "3"]),
        ("GPU-8932f937,MIG-4a5b", 1, ["GPU-8932f937"]),
        ("0,1", 0, []),
        ("", 0, []),
    ],
)
def test_the_gpus_of_the_caller_are_used(monkeypatch, listed, count, devices):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert jobs.visible_devices(count, {}) == devices
    assert jobs.visible_devices(1, {"CUDA_VISIBLE_DEVICES": "7"}) == ["7"], "cluster.environment comes first"


@pytest.mark.parametrize("listed", ["", "-1", "3", "3,-1,5"])
def test_too_few_gpus_are_refused(listed, tmp_path):
    words = "--config", "configs/tiny.yaml", "--cluster", "local", "cluster.gpus_per_node=4", f"run_dir={tmp_path}/run"
    done = run_armd("train", *words, CUDA_VISIBLE_DEVICES=listed)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"CUDA_VISIBLE_DEVICES={listed} lists " in done.stderr
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus(config, monkeypatch):
    """One line at once, before the other processes wait for this one."""
    cluster = {"tasks_per_node": 2, "gpus_per_node": 2}
    config = RunConfig.model_validate({"run_dir": config.run_dir, "cluster": cluster})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="gpus_per_node is 2 but process 1 of this machine sees 1 GPUs"):
        loop.train(config, 1, 2, 1, "nowhere")


def test_a_process_sees_the_gpus_of_its_job(session, config, started, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    stages.run("train", config, Submission("local", "word", devices=["GPU-8932f937", "3"]))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-8932f937,3"


def test_a_local_job_has_no_time_limit(config, monkeypatch, tmp_path):
    """The controller that submitit starts would end it."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(subprocess, "Popen", _Started)
    config.directory.mkdir()
    jobs.Jobs(config, "local", Path("code")).submit(jobs.JobSpec("train", "train"))
    assert int(_Started.environment["SUBMITIT_LOCAL_TIMEOUT_S"]) > 50 * 365 * 24 * 3600


class _Started:
    """In place of a process: keeps its environment."""

    pid = 4_000_000
    environment: dict[str, str]

    def __init__(self, words, *, env, **options):
        _Started.environment = env

    def poll(self):
        return 0


@pytest.mark.parametrize("name", ["exp-%j", "a%4t/run", "50%%", "%x"])
def test_patterns_in_the_run_directory_are_refused(name, tmp_path):
    words = "--config", "configs/tiny.yaml", f"run_dir={tmp_path}/{name}", "--cluster"
    for cluster in ("local", "debug", "slurm"):
        done = run_armd("train", *words, cluster, "--dry-run")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "choose a run_dir without %" in done.stderr
