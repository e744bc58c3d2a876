"""Health of a run: skipped steps, rollbacks, signals and hangs, on real processes."""

import errno
import json
import math
import os
import random
import re
import signal
import statistics
import time

import numpy as np
import pytest
import torch

from armd_scale import logs
from armd_scale.config import RunConfig
from armd_scale.data.shards import PackedDataset
from armd_scale.data.stream import SampleStream
from armd_scale.run_directory import RunDirectory
from armd_scale.training import health, manifest, telemetry
from tests.conftest import run_processes
from tests.training.test_runs import data, figures, run, start  # noqa: F401  (data is a fixture)


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


def test_lines_survive_a_full_disk(tmp_path, monkeypatch, capsys):
    """Writes fail, or stop in the middle of a line: no half line stays, and later everything is there, in order."""
    logs.configure(0)
    lines = telemetry.Lines(tmp_path / "x.jsonl")
    lines.write({"n": 0})
    raw, draw, room = lines._file, random.Random(0), [False]

    class Full:
        def write(self, content):
            if room[0]:
                return raw.write(content)
            part = draw.randrange(len(content))
            if draw.random() < 0.5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return raw.write(content[:part])

        def __getattr__(self, name):
            return getattr(raw, name)

    monkeypatch.setattr(lines, "_file", Full())
    for number in range(1, 50):
        room[0] = number in (20, 49)
        lines.write({"n": number})
        kept = (tmp_path / "x.jsonl").read_text().splitlines()
        assert [json.loads(line)["n"] for line in kept] == list(range(number + 1 if room[0] else len(kept)))
    assert capsys.readouterr().out.count("x.jsonl not written") == 2, "once for each of two errors"


def test_training_goes_on_without_wandb(tmp_path, capsys):
    class Lost:
        def log(self, *_, **__):
            raise ConnectionError("the network is gone")

    config = RunConfig.model_validate({"run_dir": str(tmp_path), "report": {"wandb": "disabled"}})
    logs.configure(0)
    writer = telemetry.Telemetry(config, active=True, first_step=0)
    writer._wandb = Lost()
    for step in (1, 2):
        writer.write({"step": step})
    writer.close()
    assert [record["step"] for record in RunDirectory(tmp_path).metrics()] == [1, 2]
    assert capsys.readouterr().out.count("wandb is lost: the network is gone") == 1


def test_slow_ranks_are_named():
    assert health.slow_ranks(np.array([1.0, 1.1, 0.9, 1.7])) == {3: pytest.approx(1.7 / 1.05)}
    assert health.slow_ranks(np.array([1.0, 1.0])) == {}
    assert health.slow_ranks(np.array([0.01, 0.01, 0.05])) == {}, "a few milliseconds are noise"


def long(folder, text, run_dir, processes=2, tensor=1, **train):
    config = run(folder, text, run_dir, processes, tensor, steps=30, checkpoint_every=4, eval_every=100, **train)
    return config


def order(folder, steps):
    """Indices of the samples of some steps."""
    stream = SampleStream(len(PackedDataset(folder / "data/train")), 0)
    return {int(sample) for step in steps for sample in stream.take(step * 8, 8)}


def _train_on_poison(rank, processes, rendezvous, config, bad, kind):
    """Training in which samples of ``bad`` make the loss, or a gradient on one rank alone, infinite or too high."""
    from armd_scale.parallel.engine import Engine
    from armd_scale.training.loop import train

    passes = Engine._run
    texts = PackedDataset(config.data_directory / "train").read(sorted(bad))
    known = {np.sort(tokens).tobytes() for tokens in texts}  # a batch holds them in another order

    def poisoned(self, micro_batches, loss, forward_only):
        results = passes(self, micro_batches, loss, forward_only)
        hit = any(np.sort(text).tobytes() in known for rows in micro_batches for text in rows.target_tokens.numpy())
        if hit and not forward_only:
            if kind == "gradient":
                self.zero.gradient(next(self.chunks.parameters())).view(-1)[0] = torch.inf
            else:
                results[0] = results[0] + (torch.inf if kind == "loss" else 50.0)
        return results

    Engine._run = poisoned
    train(config, rank, processes, rank, rendezvous)


@pytest.mark.parametrize(
    ("kind", "zero", "dtype"),
    [("loss", 0, "float32"), ("spike", 1, "float32"), ("gradient", 3, "bfloat16"), ("gradient", 1, "bfloat16")],
)  # fmt: skip
def test_single_bad_steps_are_not_applied(data, tmp_path, capfd, kind, zero, dtype):  # noqa: F811
    """Two bad steps: said so, with their samples; weights stay finite; a resumed run is the uninterrupted one."""
    config = long(data, data / "text.jsonl", tmp_path / "run", dtype=dtype)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero": zero})})
    config.directory.mkdir()
    bad = order(data, [20, 25])
    run_processes(2, _train_on_poison, config, bad, kind)
    printed = capfd.readouterr().out
    why = "a gradient is not finite" if kind == "gradient" else "its loss is"
    lines = [line for line in printed.splitlines() if "is skipped" in line]
    assert [re.search(rf" WARNING rank 0 train: step (\d+) is skipped: {why}", line)[1] for line in lines] == [
        "21",
        "26",
    ]
    assert {index for line in lines for _, index in json.loads(line.partition("number): ")[2])} == bad
    expected = figures(config.run_directory.metrics())
    assert [r["step"] for r in expected if "loss" in r] == [s for s in range(1, 33) if s not in (21, 26)]
    assert all(math.isfinite(r["loss"]) for r in expected if "loss" in r)
    for step in (28, 30, 32):
        folder = config.directory / f"checkpoints/step-{step:08d}"
        if step > 28:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    assert manifest.read(config.run_directory.newest_checkpoint())["updates"] == 26
    run_processes(2, _train_on_poison, config, bad, kind)
    assert figures(config.run_directory.metrics()) == expected


def test_after_many_bad_steps_the_run_goes_back(data, tmp_path, capfd):  # noqa: F811
    """Five in a row: back to the newest checkpoint, and on as a run that never saw their samples."""
    config = long(data, data / "text.jsonl", tmp_path / "run")
    config.directory.mkdir()
    run_processes(2, _train_on_poison, config, order(data, range(18, 23)), "loss")
    assert "rolled back to step 16; the samples of these steps are left out: [18, 23]" in capfd.readouterr().out
    fields = long(data, data / "text.jsonl", tmp_path / "calm").model_dump()
    fields["data"]["skip_steps"] = [[18, 23]]
    found, expected = figures(config.run_directory.metrics()), figures(start(RunConfig.model_validate(fields)))
    norms = [[record.pop("grad_norm", 0.0) for record in records] for records in (found, expected)]
    assert found == expected
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)  # sums over memory at other addresses after a rollback
    state = manifest.read(config.directory / "checkpoints/step-00000032")["state"]
    assert state["own_skips"] == [[18, 23]]
    hopeless = long(data, data / "text.jsonl", tmp_path / "hopeless")
    hopeless.directory.mkdir()
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="after step 18 after 2 rollbacks"):
        run_processes(2, _train_on_poison, hopeless, order(data, range(18, 100)), "loss")
    assert "are left out: [23, 28]" in capfd.readouterr().out


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
def test_a_warned_run_saves_and_goes_on(data, tmp_path, number, flag):  # noqa: F811
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


def test_a_hang_ends_with_stacks(data, tmp_path):  # noqa: F811
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
