"""Local jobs whose processes hang, or whose controller is gone: they are seen, and they can be ended."""

import json
import shutil
import socket
import subprocess
import sys
import time

import pytest

from armd_scale import config_files, logs
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.run_directory import RunDirectory
from launchers import jobs
from launchers.launcher import Launcher
from tests.conftest import ROOT, run_armd

PROCESS = """
import signal, sys, time
from pathlib import Path
from armd_scale.files import exclusive
signal.signal(signal.SIGINT, signal.SIG_IGN)
with exclusive(Path(sys.argv[1]), "a rank"):
    print("held", flush=True)
    time.sleep(60)
"""
"""A rank that hangs: it does not listen to SIGINT."""


@pytest.fixture
def config(tmp_path):
    config = RunConfig.model_validate({"run_dir": str(tmp_path / "run"), "cluster": {"tasks_per_node": 2}})
    config.directory.mkdir()
    config_files.save(config, config.run_directory.config_path)
    jobs.remember(
        config.run_directory, jobs.Submitted("train", "train", ["4000000"], "local", [4_000_000], time.time())
    )
    return config


@pytest.fixture
def hanging(config, monkeypatch):
    """A rank without a controller."""
    monkeypatch.setattr(jobs, "_END_SECONDS", 0.3)
    run = config.run_directory
    words = [sys.executable, "-c", PROCESS, run.process_path(1), "submitit.local", run.job("train", "%j")]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_rank_without_its_controller_is_seen_and_ended(config, hanging):
    run = config.run_directory
    assert [process.pid for process in run.processes()] == [hanging.pid]
    assert [record.step for record in jobs.alive(run)] == ["train"]
    with pytest.raises(UserError, match="jobs of another launcher are running in .*`armd cancel "):
        Launcher(config, "local", None, None)
    assert [record.step for record in jobs.cancel(run)] == ["train"]
    assert hanging.wait(5) == -9
    assert jobs.alive(run) == []


def test_a_controller_that_does_not_listen_is_ended(config, hanging):
    """The same process, known as the controller of the job, not as a rank."""
    run = config.run_directory
    run.process_path(1).unlink()
    record = jobs.known(run)[0]
    jobs.remember(run, record._replace(ids=[str(hanging.pid)], processes=[hanging.pid]))
    assert jobs.states(run, jobs.known(run)) == {str(hanging.pid): "RUNNING"}
    jobs.cancel(run)
    assert hanging.wait(5) == -9


def test_a_process_id_that_was_used_again(config, hanging, tmp_path):
    """By a job of another run."""
    other = RunDirectory(tmp_path / "other")
    other.path.mkdir()
    jobs.remember(other, jobs.known(config.run_directory)[0]._replace(ids=["1"], processes=[hanging.pid]))
    assert jobs.states(other, jobs.known(other)) == {}
    assert jobs.cancel(other) == []
    assert hanging.poll() is None


def test_a_run_from_a_cluster_goes_on_here(config, monkeypatch, caplog):
    """On a machine without Slurm's commands."""
    monkeypatch.setattr(logs.JOB.parent, "propagate", True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    run = config.run_directory
    jobs.remember(run, jobs.Submitted("train", "train", ["17"], "slurm", [], time.time()))
    assert jobs.alive(run) == []
    assert "no squeue on this machine" in caplog.text
    Launcher(config, "local", "train", None)


def test_jobs_on_slurm_are_not_joined_by_local_ones(config, monkeypatch):
    record = jobs.Submitted("train", "train", ["17"], "slurm", [], time.time())
    monkeypatch.setattr(jobs, "alive", lambda run: [record])
    assert Launcher(config, "slurm", None, None).running == [record]
    with pytest.raises(UserError, match="jobs of another launcher are running"):
        Launcher(config, "local", None, None)


def test_a_process_of_another_machine(config, hanging, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    done = run_armd("cancel", config.directory)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"process {hanging.pid} on " in done.stderr
    assert "run `armd cancel` there" in done.stderr
    assert hanging.poll() is None


def test_no_job_goes_on_after_an_error_of_the_launcher(config, monkeypatch):
    """Whatever the error is."""
    launcher, ended = Launcher(config, "local", "train", None), []
    monkeypatch.setattr(launcher, "_attempt", lambda *_: json.loads("{"))
    monkeypatch.setattr(jobs, "cancel", ended.append)
    with pytest.raises(ValueError, match="Expecting property name"):
        launcher._run_here(None, jobs.JobSpec("train", "train"))
    assert ended == [config.run_directory]
