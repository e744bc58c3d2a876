"""Manifests of checkpoints: damage, retention and identity."""

import json

import pytest

from armd_scale import config as configs
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest
from tests.runs import run, start, write_checkpoint


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
        write_checkpoint(run, step)
    for step in (300, 400):
        (tmp_path / f"checkpoints/step-{step:08d}/data").write_text("damaged")
    assert manifest.newest_good(run).name == "step-00000200"
    write_checkpoint(run, 250)
    manifest.retain(run, 2, None)
    assert [path.name for path in run.complete_checkpoints()] == ["step-00000200", "step-00000250"]
    assert manifest.newest_good(run).name == (tmp_path / "checkpoints/latest").read_text().strip() == "step-00000250"
    assert (tmp_path / "checkpoints/step-00000400.damaged/data").read_text() == "damaged"


def test_an_unreadable_manifest_is_passed_over(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        write_checkpoint(run, step)
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
