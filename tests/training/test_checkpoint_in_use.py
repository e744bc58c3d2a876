"""A checkpoint that the training would remove while an export or an evaluation reads it."""

import shutil
import subprocess
import sys

import pytest

from armd_scale import config as configs
from armd_scale import config_files
from armd_scale.data.shards import fill_vocabulary
from armd_scale.errors import UserError
from armd_scale.run_directory import RunDirectory
from armd_scale.training import checkpoint, export, manifest
from tests.conftest import ROOT, run_processes
from tests.runs import run, start, write_checkpoint

HOLD = """
import sys, time
from pathlib import Path
from armd_scale.training.manifest import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def steps(run):
    return [run.step_of(path) for path in run.complete_checkpoints()]


def test_it_is_removed_when_its_reader_has_ended(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (1, 2):
        write_checkpoint(run, step)
    reader = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.checkpoint(1))], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout.readline() == "held\n"
    for step in (3, 4):
        write_checkpoint(run, step)
        manifest.retain(run, 2, None)
    assert steps(run) == [1, 3, 4]
    reader.kill()
    reader.wait()
    manifest.retain(run, 2, None)
    assert steps(run) == [3, 4]


def test_removed_nevertheless_it_is_one_line(tmp_path):
    """By hand, or on a disk without locks."""
    run = RunDirectory(tmp_path)
    line = "step-00000001 was removed while it was read: run the same command again"

    def read(error, removed):
        with manifest.held(run.checkpoint(1)):
            if removed:
                shutil.rmtree(run.checkpoint(1))
            raise error

    write_checkpoint(run, 1)
    with pytest.raises(ZeroDivisionError):
        read(ZeroDivisionError, removed=False)
    with pytest.raises(UserError, match=line):
        read(AssertionError, removed=True)
    with pytest.raises(UserError, match=line):
        read(AssertionError, removed=False)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    config = run(data, data / "text.jsonl", tmp_path_factory.mktemp("run") / "run", steps=4, checkpoint_every=2)
    fields = config.model_dump()
    fields["orders"]["strided_steps"] = 0
    config = configs.RunConfig.model_validate(fields)
    start(config)
    config_files.save(config, config.run_directory.config_path)
    return config


@pytest.mark.parametrize("removed", ["by the run", "by hand"])
def test_an_export_of_a_removed_checkpoint(trained, tmp_path, removed):
    """Protected from the run; removed by hand, it is one line, and no directory stays."""
    shutil.copytree(trained.directory, tmp_path / "run")
    config = config_files.load_run(RunDirectory(tmp_path / "run"))
    outcome = run_processes(1, _export, config, tmp_path / "model", removed)[0]
    if removed == "by the run":
        assert outcome == "step-00000004"
        assert steps(config.run_directory) == [4, 5, 6]
    else:
        assert "step-00000004 was removed while it was read" in outcome
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def _export(rank, count, rendezvous, config, out, removed):
    run, read = config.run_directory, checkpoint.Weights.read

    def remove(self, name):
        if removed == "by hand":
            shutil.rmtree(run.checkpoint(4), ignore_errors=True)
        elif not run.checkpoint(5).exists():
            for step in (5, 6):
                write_checkpoint(run, step)
            manifest.retain(run, 2, None)
        return read(self, name)

    checkpoint.Weights.read = remove
    try:
        return export.export(fill_vocabulary(config), run.checkpoint(4), out)["checkpoint"]
    except UserError as error:
        return str(error)
