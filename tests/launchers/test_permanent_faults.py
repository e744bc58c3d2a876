"""Errors that the same input repeats stop a job at once; errors that can pass restart it."""

import errno
import json

import pytest
import torch

from armd_scale.config import RunConfig
from armd_scale.errors import UserError, is_permanent
from armd_scale.inference import InputError
from launchers import jobs, launcher, restart, stages
from launchers.launcher import Launcher
from launchers.stages import Submission

PERMANENT = [
    UserError("no text at /nowhere: give files"),
    InputError("a text of 40 tokens does not fit this model"),
    KeyError("text"),
    TypeError("unsupported operand"),
    ValueError("could not convert string to float"),
    AssertionError(),
    ImportError("no module"),
    NotImplementedError(),
    RecursionError("maximum recursion depth exceeded"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/x"),
    PermissionError(errno.EACCES, "Permission denied", "/data/x"),
    OSError(errno.EROFS, "Read-only file system", "/data/x"),
]
PASSING = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    torch.OutOfMemoryError("CUDA out of memory"),
    torch.distributed.DistNetworkError("the server socket has failed to listen"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    TimeoutError(),
    MemoryError(),
    OSError("an error without a number"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
]


def name(error):
    return f"{type(error).__name__} {error}"


@pytest.mark.parametrize(
    ("error", "permanent"), [(e, True) for e in PERMANENT] + [(e, False) for e in PASSING], ids=str
)
def test_what_the_same_input_repeats(error, permanent):
    assert is_permanent(error) == permanent


@pytest.fixture
def config(tmp_path):
    return RunConfig.model_validate({"run_dir": str(tmp_path), "cluster": {"backoff_seconds": 0.0}})


@pytest.fixture
def fails(config, monkeypatch):
    """Makes a local job of the stage ``export`` fail with an error; returns what a launcher says in the end."""
    started = []

    def submit(self, spec):
        job = str(len(started) + 1)
        started.append(job)
        config.run_directory.job(spec.name, job).mkdir(parents=True)
        monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", job)
        with pytest.raises(type(self.error)):
            stages.run(spec.name, config, Submission("local", "word", devices=[]))
        return jobs.Submitted(spec.name, spec.stage, [job], "local", [], 0.0), []

    def follow(self, submitted, running):
        raise launcher._Died(submitted.ids[0])

    def run(error):
        def work(config):
            raise error

        monkeypatch.setitem(stages._JOBS, "export", work)
        monkeypatch.setattr(jobs.Jobs, "error", error, raising=False)
        with pytest.raises(UserError) as reason:
            front._run_here(jobs.Jobs(config, "local", config.directory), jobs.JobSpec("export", "export"))
        return str(reason.value), len(started)

    monkeypatch.setattr(jobs.Jobs, "submit", submit)
    monkeypatch.setattr(Launcher, "_follow", follow)
    monkeypatch.setattr(stages, "die_with_parent", lambda parent: None)
    monkeypatch.setattr(stages.logs, "configure", lambda rank=None: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    front = Launcher(config, "local", None, None)
    return run


@pytest.mark.parametrize("error", PERMANENT, ids=name)
def test_a_permanent_fault_stops_at_once(config, fails, error):
    said, starts = fails(error)
    assert starts == 1
    if isinstance(error, UserError | InputError):
        assert said == str(error)
    else:
        log = config.run_directory.log_path("export", "1", 0, "err")
        line = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}".removesuffix(": ")
        assert said == f"job 'export' failed and would fail again: {line}; see the traceback in {log}"
    assert [record["decision"][:6] for record in config.run_directory.restarts()] == ["stops:"]


@pytest.mark.parametrize("error", PASSING[:2], ids=name)
def test_a_fault_that_can_pass_is_retried(config, fails, error):
    said, starts = fails(error)
    assert starts == config.cluster.max_restarts + 1
    assert said.startswith(f"job 'export' failed: failed {starts} times without a new checkpoint: ")
    assert said.endswith("the same command resumes from the newest checkpoint")


def test_the_record_of_an_older_job(config, tmp_path):
    folder = config.run_directory.job("train", "1")
    folder.mkdir(parents=True)
    config.run_directory.error_path(folder).write_text(json.dumps({"line": "out of luck", "bad_input": False}))
    assert launcher._failure(config, "train", "1", "out of luck").startswith(
        "job 'train' failed: out of luck (logs in "
    )
    assert restart.failing(config, "train", "1")
