"""Whole training runs on gloo: resuming, skipped steps and rollbacks."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

from armd_scale.config import RunConfig
from armd_scale.data.shards import PackedDataset
from armd_scale.data.stream import SampleStream
from armd_scale.errors import UserError
from armd_scale.training import manifest
from tests.conftest import run_processes
from tests.runs import figures, run, start, tensors


@pytest.mark.parametrize(("processes", "tensor"), [(1, 1), (4, 2)])
def test_a_resumed_run_is_the_uninterrupted_one(data, tmp_path, processes, tensor):
    """Stopped after a checkpoint, in any phase, and resumed: the same losses and files, bit for bit."""
    text = data / "text.jsonl"
    whole = run(data, text, tmp_path / "whole", processes, tensor)
    expected = figures(start(whole))
    assert [r["step"] for r in expected if "loss" in r] == list(range(1, 9))
    assert {r["phase"] for r in expected if "loss" in r} == {"left-to-right", "permutation", "strided"}
    for stop in (2, 4, 6):
        config = run(data, text, tmp_path / f"stopped-{stop}", processes, tensor)
        (config.directory / "checkpoints").mkdir(parents=True)
        # a run that died some steps after its checkpoint: later records, and a half-written next checkpoint
        shutil.copy(whole.directory / "metrics.jsonl", config.directory)
        name = f"checkpoints/step-{stop:08d}"
        shutil.copytree(whole.directory / name, config.directory / name)
        (config.directory / "checkpoints/.step-00000007.partial").mkdir()
        (config.directory / "checkpoints/step-00000009").mkdir()
        assert figures(start(config)) == expected
        last = "checkpoints/step-00000008"
        assert tensors(whole.directory / last) == tensors(config.directory / last)


def test_training_learns(data, tmp_path):
    """Random words: the loss must fall from log V towards the entropy of the words."""
    config = run(data, data / "text.jsonl", tmp_path / "run", steps=60, eval_every=60, checkpoint_every=60)
    records = [r for r in start(config) if "loss" in r]
    assert records[0]["loss"] == pytest.approx(np.log(300), abs=0.2)
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]


def test_wrong_number_of_processes(data, tmp_path):
    from armd_scale.training.loop import train

    with pytest.raises(UserError, match="1 processes but 2"):
        train(run(data, data / "text.jsonl", tmp_path), 0, 2, 0, tmp_path / "store")


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
                self.zero.gradient(next(self.stages.parameters())).view(-1)[0] = torch.inf
            else:
                results[0] = results[0] + (torch.inf if kind == "loss" else 50.0)
        return results

    Engine._run = poisoned
    train(config, rank, processes, rank, rendezvous)


@pytest.mark.parametrize(
    ("kind", "zero", "dtype"),
    [("loss", 0, "float32"), ("spike", 1, "float32"), ("gradient", 3, "bfloat16"), ("gradient", 1, "bfloat16")],
)  # fmt: skip
def test_single_bad_steps_are_not_applied(data, tmp_path, capfd, kind, zero, dtype):
    """Two bad steps are logged with their samples; weights stay finite; a resumed run is the uninterrupted one."""
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


def test_after_many_bad_steps_the_run_goes_back(data, tmp_path, capfd):
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
