"""Whole training runs on gloo: resuming, checkpoints, and what they refuse."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch

from armd_scale import config as configs
from armd_scale.config import RunConfig
from armd_scale.data.shards import PackedDataset
from armd_scale.data.stream import SampleStream
from armd_scale.errors import UserError
from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest, samples, schedules
from data_pipeline import prepare
from tests.conftest import run_processes

PANGRAMS = "the quick brown fox jumps over a lazy dog while seven wizards quietly judge my vow of black quartz"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small prepared data set of made-up prose."""
    folder = tmp_path_factory.mktemp("data")
    words = PANGRAMS.split()
    draw = np.random.default_rng(0)
    text = folder / "text.jsonl"
    lines = [json.dumps({"text": " ".join(draw.choice(words, 60)) + ".\n"}) for _ in range(200)]
    text.write_text("\n".join(lines))
    config = run(folder, text, folder / "unused")
    prepare.prepare(config)
    return folder


def run(folder, text, run_dir, processes=1, tensor=1, **train):
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "model": {"layers": 2, "hidden": 32, "heads": 2, "length": 32},
            "orders": {"ar_steps": 2, "permutation_steps": 4, "rho": 8, "strided_steps": 2, "streams": [1, 2, 4]},
            "data": {
                "text": [str(text)],
                "directory": str(folder / "data"),
                "vocab_size": 300,
                "heldout_fraction": 0.1,
                "samples_per_shard": 16,
            },
            "optimizer": {"lr": 3e-3, "warmup_steps": 2, "schedule": "cosine", "ema": 0.9, "eps": 1e-5},
            "train": {
                "steps": 6, "global_batch": 8, "micro_batch": 2, "dtype": "float32", "log_every": 1, "eval_every": 3,
                "eval_samples": 6, "checkpoint_every": 2, "keep_checkpoints": 9, **train,
            },
            "report": {"wandb": "disabled"},
            "parallel": {"tensor": tensor},
            "cluster": {"tasks_per_node": processes},
        }
    )  # fmt: skip


def start(config):
    config.directory.mkdir(parents=True, exist_ok=True)
    run_processes(config.cluster.processes, _train, config)
    return config.run_directory.metrics()


def _train(rank, processes, rendezvous, config):
    from armd_scale.training.loop import train

    train(config, rank, processes, rank, rendezvous)


def figures(records):
    """What must be equal bit for bit: everything but the times."""
    return [{k: v for k, v in record.items() if "second" not in k and k != "slow_ranks"} for record in records]


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
        assert _tensors(whole.directory / last) == _tensors(config.directory / last)


def _tensors(checkpoint, raw=True):
    from torch.distributed.checkpoint import FileSystemReader, load

    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    target = {key: torch.empty(entry.size) for key, entry in entries.items()}
    load(target, checkpoint_id=checkpoint, no_dist=True)
    assert {key.partition("/")[0] for key in target} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    return {key: tensor.numpy().tobytes() if raw else tensor for key, tensor in target.items()}


LAYOUTS = {
    "one": (1, {}),
    "tensor 2 data 2": (4, {"tensor": 2}),
    "pipeline 2 interleaved": (2, {"pipeline": 2, "chunks": 2}),
    "zero 3": (2, {"zero": 3}),
    "pipeline 2 tensor 2 sequence": (4, {"pipeline": 2, "tensor": 2, "sequence": True}),
    "zero 0": (2, {"zero": 0}),
    "zero 2 recompute": (2, {"zero": 2, "recompute": "full"}),
}


def test_a_checkpoint_is_free_of_its_layout(data, tmp_path):
    """Saved under each layout, resumed under the next: the same losses, weights, moments and average."""
    runs = {}
    for name, (processes, parallel) in LAYOUTS.items():
        base = run(data, data / "text.jsonl", tmp_path / name, processes)
        fields = base.model_dump()
        fields["parallel"] |= parallel
        fields["model"]["layers"] = 4
        runs[name] = RunConfig.model_validate(fields)
        start(runs[name])
    last = "checkpoints/step-00000008"
    expected, final = RunDirectory(tmp_path / "one").metrics(), _tensors(tmp_path / "one" / last, raw=False)
    names = list(LAYOUTS)
    for source, target in zip(names, names[1:] + names[:1], strict=True):
        moved = runs[target].model_copy(update={"run_dir": str(tmp_path / f"{source} to {target}")})
        name = "checkpoints/step-00000004"
        shutil.copytree(tmp_path / source / name, moved.directory / name)
        got = start(moved)
        wanted = [r for r in expected if r["step"] > 4]
        for found, known in zip((r for r in got if r["step"] > 4), wanted, strict=True):
            for key in ("loss", "grad_norm", "heldout_left_to_right", "heldout_strided"):
                if key in known:
                    assert found[key] == pytest.approx(known[key], rel=1e-4), (source, target, key)
        found = _tensors(moved.directory / last, raw=False)
        assert found.keys() == final.keys()
        for key, tensor in final.items():
            torch.testing.assert_close(found[key], tensor, atol=2e-5, rtol=1e-3, msg=f"{source} to {target}: {key}")


EXACT = {
    "zero 3, sizes that do not divide": (4, {"zero": 3}, "float32"),
    "zero 3, bf16, sizes that do not divide": (4, {"zero": 3}, "bfloat16"),
    "zero 2, bf16": (2, {"zero": 2}, "bfloat16"),
    "pipeline 3, bf16": (3, {"pipeline": 3}, "bfloat16"),
    "interleaved, data 2, bf16": (4, {"pipeline": 2, "chunks": 2}, "bfloat16"),
    "pipeline 4, zero 0": (4, {"pipeline": 4, "zero": 0}, "float32"),
}


def test_states_survive_every_layout_bit_for_bit(data, tmp_path):
    """Read under a layout and written by it at once: the same weights, moments and average to the last bit."""
    fields = run(data, data / "text.jsonl", tmp_path / "one").model_dump()
    fields["model"] |= {"layers": 4, "hidden": 30, "heads": 3, "ffn": 96, "length": 32}
    fields["data"]["vocab_size"] = 300
    start(RunConfig.model_validate(fields))
    source = tmp_path / "one/checkpoints/step-00000008"
    expected = _tensors(source)
    for name, (processes, parallel, dtype) in EXACT.items():
        changed = {**fields, "run_dir": str(tmp_path / name), "cluster": {"tasks_per_node": processes}}
        changed["parallel"] = {**fields["parallel"], **parallel}
        changed["train"] = {**fields["train"], "dtype": dtype}
        run_processes(processes, _pass_on, RunConfig.model_validate(changed), source)
        assert _tensors(tmp_path / name / "checkpoints/step-00000008") == expected, name


def _pass_on(rank, processes, rendezvous, config, source):
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine
    from armd_scale.training import checkpoint

    index = PackedDataset(config.data_directory / "train").index
    config = configs.with_vocabulary(config, index["vocab_size"], index["bos_id"])
    device = torch.device("cpu")
    groups.start(config.parallel, rank=rank, processes=processes, rendezvous=rendezvous, device=device)
    engine = Engine(config, device)
    facts = checkpoint.load(engine, source)
    writer = checkpoint.Checkpointer(engine, config.run_directory, keep=1, keep_every=None)
    writer.save(facts["step"], facts["updates"], facts["state"])
    writer.close()
    groups.stop()


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


def test_damaged_checkpoints_are_named(data, tmp_path):
    config = run(data, data / "text.jsonl", tmp_path / "run")
    start(config)
    newest = config.run_directory.newest_checkpoint()
    assert newest.name == "step-00000008"
    good = next(newest.glob("*.distcp")).read_bytes()
    file = next(newest.glob("*.distcp"))
    file.write_bytes(good[:-7])
    with pytest.raises(UserError, match=rf"step-00000008 .* {file.name} has \d+ bytes"):
        manifest.verify(newest)
    file.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(UserError, match="another SHA-256"):
        manifest.verify(newest)
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        manifest.verify(newest)
    (newest / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="no readable manifest"):
        manifest.verify(newest)
    (newest / "manifest.json").unlink()
    assert config.run_directory.newest_checkpoint().name == "step-00000006"


def test_old_checkpoints_are_removed(data, tmp_path):
    config = run(data, data / "text.jsonl", tmp_path / "run", keep_checkpoints=2)
    start(config)
    names = [path.name for path in config.run_directory.complete_checkpoints()]
    assert names == ["step-00000006", "step-00000008"]


def test_damaged_checkpoints_do_not_push_out_good_ones(tmp_path):
    """Steps 300 and 400 are damaged; the run goes on from 200 and writes 250: that one must stay."""
    run = RunDirectory(tmp_path)
    for step in (100, 200, 300, 400):
        _checkpoint(run, step)
    for step in (300, 400):
        (tmp_path / f"checkpoints/step-{step:08d}/data").write_text("damaged")
    assert manifest.newest_good(run).name == "step-00000200"
    _checkpoint(run, 250)
    manifest.retain(run, 2, None)
    assert [path.name for path in run.complete_checkpoints()] == ["step-00000200", "step-00000250"]
    assert manifest.newest_good(run).name == (tmp_path / "checkpoints/latest").read_text().strip() == "step-00000250"
    assert (tmp_path / "checkpoints/step-00000400.damaged/data").read_text() == "damaged"


def _checkpoint(run, step):
    partial = run.partial_checkpoint(step)
    partial.mkdir(parents=True)
    (partial / "data").write_text(str(step))
    manifest.write(partial, {"step": step})
    manifest.publish(run, step)


def test_an_unreadable_manifest_is_passed_over(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        _checkpoint(run, step)
    (tmp_path / "checkpoints/step-00000003/manifest.json").write_text("")
    (tmp_path / "checkpoints/step-00000002/manifest.json").write_text('{"files": {"data": 1}}')
    assert manifest.readable(run).name == "step-00000001"
    assert manifest.newest_good(run).name == "step-00000001"


def test_fields_that_are_younger_than_a_checkpoint(tmp_path):
    """A checkpoint without a field of today was made with its default."""
    config = RunConfig()
    for extra, allowed in (({}, True), ({"data": {"deduplicate": True}}, False)):
        was = configs.identity(config)
        del was["data"]["deduplicate"], was["model"]["rope_base"]
        folder = tmp_path / str(allowed)
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"files": {}, "state": {"identity": was}}))
        now = RunConfig.model_validate(extra)
        if allowed:
            manifest.check_identity(folder, now)
        else:
            with pytest.raises(UserError, match="another .data."):
                manifest.check_identity(folder, now)


@pytest.mark.parametrize(("before", "now"), [(None, True), (False, True), (True, False)])
def test_fp8_is_neither_begun_nor_left_on_the_way(before, now, tmp_path):
    """Also not from a checkpoint that is older than the choice."""
    was = configs.identity(RunConfig.model_validate({"train": {"fp8": bool(before)}}))
    if before is None:
        del was["train.fp8"]
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {}, "state": {"identity": was}}))
    manifest.check_identity(tmp_path, RunConfig.model_validate({"train": {"fp8": not now}}))
    with pytest.raises(UserError, match="another .train.fp8."):
        manifest.check_identity(tmp_path, RunConfig.model_validate({"train": {"fp8": now}}))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(data, tmp_path, capfd):
    """The disk is full once, on rank 0, when it closes a checkpoint: all ranks go on, and the next one is written."""
    config = run(data, data / "text.jsonl", tmp_path / "run", 2, 2)
    config.directory.mkdir()
    run_processes(2, _train_on_a_full_disk, config)
    names = [path.name for path in config.run_directory.complete_checkpoints()]
    assert names == ["step-00000004", "step-00000006", "step-00000008"]
    assert "checkpoint of step 2 not written, training continues: [Errno 28]" in capfd.readouterr().out


def _train_on_a_full_disk(rank, processes, rendezvous, config):
    write, calls = manifest.write, []

    def full(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    manifest.write = full
    _train(rank, processes, rendezvous, config)


def test_training_learns(data, tmp_path):
    """Random words: the loss must fall from log V towards the entropy of the words."""
    config = run(data, data / "text.jsonl", tmp_path / "run", steps=60, eval_every=60, checkpoint_every=60)
    records = [r for r in start(config) if "loss" in r]
    assert records[0]["loss"] == pytest.approx(np.log(300), abs=0.2)
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]


def test_learning_rate():
    options = configs.OptimizerConfig(lr=1.0, warmup_steps=4, schedule="cosine", min_lr_ratio=0.1)
    rates = [schedules.learning_rate(step, options, 12) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.1)
    assert rates[8] == pytest.approx(0.55)
    constant = options.model_copy(update={"schedule": "constant"})
    assert schedules.learning_rate(10**6, constant, 12) == 1.0


def test_wrong_number_of_processes(data, tmp_path):
    from armd_scale.training.loop import train

    with pytest.raises(UserError, match="1 processes but 2"):
        train(run(data, data / "text.jsonl", tmp_path), 0, 2, 0, tmp_path / "store")
