"""Checkpoints under every layout, and on a full disk."""

import errno
import shutil

import pytest
import torch

from armd_scale import config as configs
from armd_scale.config import RunConfig
from armd_scale.data.shards import PackedDataset
from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest
from tests.conftest import run_processes
from tests.runs import run, start, tensors, train

LAYOUTS = {
    "one": (1, {}),
    "tensor 2 data 2": (4, {"tensor": 2}),
    "pipeline 2 interleaved": (2, {"pipeline": 2, "chunks": 2}),
    "zero 3": (2, {"zero": 3}),
    "pipeline 2 tensor 2 sequence": (4, {"pipeline": 2, "tensor": 2, "sequence": True}),
    "context 2 zero 2 recompute": (2, {"context": 2, "zero": 2, "recompute": "full"}),
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
    expected, final = RunDirectory(tmp_path / "one").metrics(), tensors(tmp_path / "one" / last, raw=False)
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
        found = tensors(moved.directory / last, raw=False)
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
    expected = tensors(source)
    for name, (processes, parallel, dtype) in EXACT.items():
        changed = {**fields, "run_dir": str(tmp_path / name), "cluster": {"tasks_per_node": processes}}
        changed["parallel"] = {**fields["parallel"], **parallel}
        changed["train"] = {**fields["train"], "dtype": dtype}
        run_processes(processes, _pass_on, RunConfig.model_validate(changed), source)
        assert tensors(tmp_path / name / "checkpoints/step-00000008") == expected, name


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
    writer = checkpoint.Checkpointer(engine, config.run_directory, config.train)
    writer.save(facts["step"], facts["updates"], facts["state"])
    writer.close()
    groups.stop()


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
    train(rank, processes, rendezvous, config)
