"""kill -9 at random moments, while training and while a checkpoint is being written: nothing is lost."""

import os
import random
import signal
import subprocess
import sys
import time

from armd_scale import config as configs
from armd_scale.training import manifest
from armd_scale.training.telemetry import read_metrics
from tests.training.test_runs import data, figures, run  # noqa: F401  (data is a fixture)

_WORKER = """
import sys
from armd_scale import config as configs
from armd_scale.training.loop import train
train(configs.load(sys.argv[1]), int(sys.argv[2]), 2, int(sys.argv[2]), sys.argv[3])
"""
KILLS = int(os.environ.get("ARMD_KILLS", "3"))


def _start(path, store):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", _WORKER, str(path)]
    return [
        subprocess.Popen([*words, str(rank), str(store)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for rank in range(2)
    ]


def _prepare(data, folder):  # noqa: F811
    config = run(
        data, data / "text.jsonl", folder, 2, 2, steps=60, checkpoint_every=3, eval_every=30, keep_checkpoints=2
    )
    folder.mkdir()
    configs.save(config, folder / "config.yaml")
    return config


def test_kill_at_random_moments(data, tmp_path):  # noqa: F811
    """Both ranks killed, again and again: every restart finds a good checkpoint, the end is that of the calm run."""
    calm = _prepare(data, tmp_path / "calm")
    for process in _start(calm.directory / "config.yaml", tmp_path / "store-calm"):
        assert process.wait(timeout=120) == 0
    expected = figures(read_metrics(calm.directory))
    config = _prepare(data, tmp_path / "killed")
    draw = random.Random(0)
    reached = []
    for attempt in range(KILLS):
        processes = _start(config.directory / "config.yaml", tmp_path / f"store-{attempt}")
        seen = len(read_metrics(config.directory))
        deadline = time.monotonic() + 60
        while len(read_metrics(config.directory)) <= seen and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.5))
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait(timeout=30)
        newest = manifest.newest_good(config.directory / "checkpoints")
        reached.append(manifest.step_of(newest) if newest else 0)
        for found in manifest.complete(config.directory / "checkpoints"):
            manifest.verify(found)
    assert reached == sorted(reached)
    for process in _start(config.directory / "config.yaml", tmp_path / "store-last"):
        assert process.wait(timeout=120) == 0
    got = figures(read_metrics(config.directory))
    assert got == expected
