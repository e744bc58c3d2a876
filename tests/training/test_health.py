"""Health of a run: spikes, slow ranks, signals and hangs, on real processes."""

import json
import math
import os
import signal
import statistics
import time

import numpy as np
import pytest
import torch

from armd_scale.data.shards import PackedDataset
from armd_scale.data.stream import SampleStream
from armd_scale.run_directory import RunDirectory
from armd_scale.training import health
from tests.conftest import run_processes
from tests.runs import figures, start
from tests.training.test_loop import long


def test_spikes_are_judged_by_the_median():
    spikes = health.Spikes(2.0, {})
    for step in range(100):
        assert spikes.limit(step) == (math.inf if step < 17 else 8.0), "nothing is a spike at the beginning"
        spikes.applied(step, 5.0 + step % 3)
    assert health.Spikes(None, spikes.state).limit(100) == math.inf


def test_losses_of_older_checkpoints_are_known():
    assert health.Spikes(2.0, {"recent_losses": [5.0] * 20}).limit(1000) == 7.0


def test_the_limit_of_a_step_leaves_out_the_step_before_it():
    """Which may run still; one that is known already, as after a checkpoint, changes nothing."""
    spikes = health.Spikes(2.0, {})
    for step in range(80):
        spikes.applied(step, float(step))
    early = spikes.limit(81)
    spikes.applied(80, 80.0)
    assert spikes.limit(81) == early == 2 + statistics.median(range(16, 80))
    assert health.Spikes(2.0, json.loads(json.dumps(spikes.state))).limit(81) == early
    assert spikes.limit(82) == early + 1


def test_slow_ranks_are_named():
    assert health.slow_ranks(np.array([1.0, 1.1, 0.9, 1.7])) == {3: pytest.approx(1.7 / 1.05)}
    assert health.slow_ranks(np.array([1.0, 1.0])) == {}
    assert health.slow_ranks(np.array([0.01, 0.01, 0.05])) == {}, "a few milliseconds are noise"


def _train_and_tell(rank, processes, rendezvous, config):
    from armd_scale.training.loop import train

    return train(config, rank, processes, rank, rendezvous)


def _disturb(config, act):
    """Start a run of two processes, and do something to them once it is under way."""
    config.directory.mkdir()
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=_outcome, args=(config, results))
    process.start()
    deadline = time.monotonic() + 60
    while len(config.run_directory.metrics()) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    act([beat["pid"] for beat in config.run_directory.heartbeats()])
    process.join(90)
    return results.get()


def _outcome(config, results):
    try:
        results.put(run_processes(2, _train_and_tell, config))
    except Exception as error:
        results.put(repr(error))


@pytest.mark.parametrize(("number", "flag"), [(signal.SIGUSR2, health.REQUEUE), (signal.SIGTERM, health.STOP)])
def test_a_warned_run_saves_and_goes_on(data, tmp_path, number, flag):
    """One rank is told; both save and end; the run goes on as if nothing had been, sample for sample."""
    text = data / "text.jsonl"
    config = long(data, text, tmp_path / "run", log_every=3, log_samples=True)
    assert _disturb(config, lambda pids: os.kill(pids[1], number)) == [flag, flag]
    stopped = RunDirectory.step_of(config.run_directory.newest_checkpoint())
    assert 6 <= stopped < 32
    assert figures(start(config)) == figures(start(long(data, text, tmp_path / "calm", log_every=3)))
    seen = {}
    for path in (config.directory / "samples").glob("rank-*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            for place, (_, index) in enumerate(record["ids"]):
                seen[record["first"] + place] = index
    stream = SampleStream(len(PackedDataset(data / "data/train")), 0)
    assert [seen[number] for number in range(32 * 8)] == stream.take(0, 32 * 8).tolist()


def test_a_hang_ends_with_stacks(data, tmp_path):
    """One rank is stopped: the other writes its stack and ends, within the time that is set."""
    config = long(data, data / "text.jsonl", tmp_path / "run", hang_seconds=2.0)
    started = []

    def stop(pids):
        started.append(time.monotonic())
        os.kill(pids[1], signal.SIGSTOP)
        while not (config.directory / "stacks/rank-00000.txt").stat().st_size:
            time.sleep(0.05)
            assert time.monotonic() < started[0] + 40
        os.kill(pids[1], signal.SIGKILL)

    outcome = _disturb(config, stop)
    assert "exit code 1" in outcome or "SIGKILL" in outcome
    stack = (config.directory / "stacks/rank-00000.txt").read_text()
    assert "Timeout" in stack
    assert "train_step" in stack
