"""Locks that die with their process, processes that die with their parent, and signals that wait."""

import os
import signal
import subprocess
import sys
import time

import pytest

from armd_scale import files, processes
from armd_scale.errors import UserError
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from armd_scale.files import exclusive
with exclusive(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""
PARENT = """
import os, time
from armd_scale.processes import die_with_parent
parent = os.getpid()
child = os.fork()
if child == 0:
    die_with_parent(parent)
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


def start(code, *words):
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE)
    return process, process.stdout.readline().decode().strip()


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / "lock"
    assert files.holder(path) is None
    process, _ = start(HOLD, path)
    assert files.holder(path).pid == process.pid
    with (
        pytest.raises(UserError, match=rf"works on it \(process {process.pid} on .*\): wait"),
        files.exclusive(path, "it"),
    ):
        pass
    process.kill()
    process.wait()
    assert files.holder(path) is None
    with files.exclusive(path, "it"):
        assert files.holder(path).pid == os.getpid()
    assert files.holder(path) is None


def test_a_process_that_waits_comes_next(tmp_path):
    path = tmp_path / "lock"
    process, _ = start(HOLD, path)
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"])
    with files.exclusive(path, "it", wait=True):
        assert process.wait(5) == -signal.SIGKILL


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    monkeypatch.setattr(files.logs.DATA.parent, "propagate", True)
    with files.exclusive(tmp_path / "lock", "it"):
        assert "start one process at a time for it" in caplog.text


def test_a_child_dies_with_its_parent():
    process, child = start(PARENT)
    os.kill(int(child), 0)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while _lives(int(child)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", processes.ENDING)
def test_signals_wait(number):
    heard = []

    def work():
        with processes.postponed_signals():
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            heard.append("work done")

    before = signal.signal(number, lambda *_: heard.append("signal"))
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert heard == ["work done", "signal"]
        signal.signal(number, signal.SIG_IGN)  # nohup
        work()
    finally:
        signal.signal(number, before)
