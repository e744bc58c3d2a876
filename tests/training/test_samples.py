"""The samples of a run: skipped steps, damaged shards, another tokenizer."""

import json
import shutil

import numpy as np
import pytest
import torch

from armd_scale.config import RunConfig
from armd_scale.data.shards import PackedDataset
from armd_scale.data.stream import SampleStream
from armd_scale.errors import UserError
from armd_scale.run_directory import RunDirectory
from armd_scale.training import samples
from tests.runs import run, start


def test_a_range_of_the_data_is_skipped(data, tmp_path, capfd):
    """After a checkpoint, the batches of two steps are left out: the steps behind them move up."""
    base = run(data, data / "text.jsonl", tmp_path / "run", checkpoint_every=3)
    start(base)
    fields = base.model_dump()
    fields["data"]["skip_steps"] = [[4, 6]]
    skipping = RunConfig.model_validate(fields)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    before = [r["loss"] for r in RunDirectory(tmp_path / "run").metrics() if "loss" in r]
    records = [r["loss"] for r in start(skipping) if "loss" in r]
    assert records[:4] == before[:4]
    assert records[4] != before[4]
    assert "left out: [[4, 6]]" in capfd.readouterr().out
    fields["data"]["skip_steps"] = [[1, 2]]
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="before step 8"):
        start(RunConfig.model_validate(fields))


def test_another_tokenizer_is_refused(data, tmp_path):
    """The data of a run is made anew in its place, with another tokenizer: no step is made with it."""
    shutil.copytree(data / "data", tmp_path / "data")
    config = run(tmp_path, data / "text.jsonl", tmp_path / "run")
    start(config)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    index = tmp_path / "data/train/index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "tokenizer_sha256": "other"}))
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="another tokenizer"):
        start(config)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_run_goes_on_without_a_lost_shard(data, tmp_path, capfd):
    """A shard is damaged between two starts: the order of the other samples stays, and goes on where it was."""
    shutil.copytree(data / "data", tmp_path / "data")
    base = run(tmp_path, data / "text.jsonl", tmp_path / "run", checkpoint_every=3)
    start(base)
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:08d}")
    shard = tmp_path / "data/train/shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match="shard-000001.tar is damaged"):
        samples.check(base)
    fields = base.model_dump()
    fields["data"]["damaged_shards"] = "leave_out"
    config = RunConfig.model_validate(fields)
    samples.check(config)
    records = start(config)
    assert records[-1]["step"] == 8
    assert f"left out from sample 24 on: {shard}" in capfd.readouterr().out
    facts = json.loads((tmp_path / "run/checkpoints/step-00000008/manifest.json").read_text())
    assert facts["state"]["left_out"] == [[24, 0, "shard-000001.tar"]]
    reader = samples.Samples(config)
    reader.start(8, facts["state"])
    whole = PackedDataset(data / "data/train")
    order = SampleStream(len(whole), 0).take(0, 2 * len(whole))
    kept = [*order[:24], *(one for one in order[24:] if not 16 <= one < 32)]
    assert np.array_equal(reader.read(0, 64), whole.read(kept[:64]))


def test_every_sample_once_and_the_same_on_any_number_of_ranks(data):
    """The samples of a step are those of the stream, whatever the ranks, and an epoch is a permutation."""
    index = PackedDataset(data / "data/train")
    stream = SampleStream(len(index), 0)
    seen = stream.take(0, len(index))
    assert sorted(seen.tolist()) == list(range(len(index)))
    for step in range(3):
        for ranks in (1, 2, 4):
            share = 8 // ranks
            parts = [stream.take(step * 8 + rank * share, share) for rank in range(ranks)]
            assert np.array_equal(np.concatenate(parts), stream.take(step * 8, 8))
