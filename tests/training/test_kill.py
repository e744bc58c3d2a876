"""kill -9 at random moments, while training and while a checkpoint is being written: nothing is lost."""

import os
import random
import signal
import time

import torch.multiprocessing

from armd_scale import config_files
from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest
from tests.runs import figures, run

KILLS = int(os.environ.get("ARMD_KILLS", "6"))


def _worker(rank, path, store):
    from armd_scale.training.loop import train

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    train(config_files.load(path), rank, 2, rank, store)


def _start(path, store):
    from armd_scale.parallel import megatron_cpu

    megatron_cpu.install()
    # Forked: a group starts in a fraction of a second, so that the kills fall into its work.
    return torch.multiprocessing.start_processes(_worker, (path, store), nprocs=2, start_method="fork", join=False)


def _prepare(data, folder):
    config = run(
        data, data / "text.jsonl", folder, 2, 2, steps=60, checkpoint_every=3, eval_every=30, keep_checkpoints=2
    )
    folder.mkdir()
    config_files.save(config, folder / "config.yaml")
    return config


def _finish(group):
    while not group.join(timeout=60):
        pass


def test_kill_at_random_moments(data, tmp_path):
    """Both ranks killed, again and again: every restart finds a good checkpoint, the end is that of the calm run."""
    calm = _prepare(data, tmp_path / "calm")
    _finish(_start(calm.directory / "config.yaml", tmp_path / "store-calm"))
    expected = figures(calm.run_directory.metrics())
    config = _prepare(data, tmp_path / "killed")
    draw = random.Random(0)
    reached, while_saving = [], 0
    for attempt in range(KILLS):
        group = _start(config.directory / "config.yaml", tmp_path / f"store-{attempt}")
        seen = len(config.run_directory.metrics())
        deadline = time.monotonic() + 60
        while len(config.run_directory.metrics()) <= seen and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.3))
        for pid in group.pids():
            os.kill(pid, signal.SIGKILL)
        for process in group.processes:
            process.join(30)
        while_saving += any(config.run_directory.checkpoints.glob(".step-*.partial"))
        newest = manifest.newest_good(config.run_directory)
        reached.append(RunDirectory.step_of(newest) if newest else 0)
        for found in config.run_directory.complete_checkpoints():
            manifest.verify(found)
    assert reached == sorted(reached)
    assert while_saving or KILLS < 10, "no kill fell into the writing of a checkpoint: the test proves too little"
    print(f"{KILLS} kills, {while_saving} while a checkpoint was written; reached {reached}")
    _finish(_start(config.directory / "config.yaml", tmp_path / "store-last"))
    assert figures(config.run_directory.metrics()) == expected
