"""A run directory that was moved or copied, and a run that is resumed from another working directory."""

import json
import os

import pytest

from armd_scale import config as configs
from armd_scale import config_files
from armd_scale.config import RunConfig
from armd_scale.run_directory import RunDirectory
from launchers import jobs
from launchers.launcher import Launcher
from tests.conftest import run_armd


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two working directories; the first is current."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def begin(**fields):
    """Begin a run like ``armd train``, with a checkpoint of its last step; its configuration."""
    config = RunConfig.model_validate({"name": "a", "train": {"steps": 4}, "orders": ORDERS, **fields})
    config.directory.mkdir(parents=True)
    Launcher(config, "local", None, None)
    checkpoint = config.run_directory.checkpoint(4)
    checkpoint.mkdir(parents=True)
    state = {"identity": configs.identity(config)}
    config.run_directory.manifest_path(checkpoint).write_text(json.dumps({"step": 4, "files": {}, "state": state}))
    return config


ORDERS = {"ar_steps": 0, "permutation_steps": 0, "strided_steps": 0}


@pytest.mark.parametrize("run_dir", [None, "runs/a", "{places}/here/runs/a"])
@pytest.mark.parametrize("moved", ["../there/b", "runs/b", "runs/a"])
def test_a_run_goes_on_where_it_lies(places, run_dir, moved):
    begin(run_dir=run_dir and run_dir.format(places=places))
    os.makedirs(os.path.dirname(moved), exist_ok=True)
    os.rename("runs/a", moved)
    config = config_files.load(f"{moved}/config.yaml")
    assert config.directory.resolve() == (places / "here" / moved).resolve()
    assert jobs.is_trained(config)
    assert [spec.name for spec in jobs.remaining_jobs(config)] == ["export", "evaluate"]
    Launcher(config, "local", None, None)
    assert config_files.load_run(config.run_directory).run_dir == moved


def test_from_another_working_directory(places, monkeypatch):
    begin(data={"directory": "data"})
    monkeypatch.chdir(places / "there")
    config = config_files.load("../here/runs/a/config.yaml")
    assert jobs.is_trained(config)
    assert config.data_directory == places / "here/data"


@pytest.mark.parametrize("directory", ["runs/a/data", "{places}/here/runs/a/data", None])
def test_data_in_the_run_directory_move_with_it(places, directory):
    begin(data={"directory": directory and directory.format(places=places)})
    os.rename("runs/a", "../there/b")
    config = config_files.load("../there/b/config.yaml")
    assert config.data_directory.resolve() == places / "there/b/data"


@pytest.mark.parametrize(("word", "directory"), [("run_dir=runs/c", "runs/c"), ("run_dir=null", "runs/a")])
def test_another_directory_can_be_named(places, word, directory):
    begin()
    os.rename("runs/a", "runs/b")
    assert str(config_files.load("runs/b/config.yaml", [word]).directory) == directory
    assert str(config_files.load("runs/b/config.yaml", ["seed=1"]).directory) == "runs/b"


@pytest.mark.parametrize("name", ["config.yaml", "other.yaml"])
def test_a_configuration_elsewhere_means_what_it_says(places, name):
    """Also one of the same name, and a copy under another name beside a run."""
    config_files.save(RunConfig(name="mine"), name)
    assert str(config_files.load(name).directory) == "runs/mine"
    begin()
    config_files.save(RunConfig(name="mine"), "runs/a/other.yaml")
    assert str(config_files.load("runs/a/other.yaml").directory) == "runs/mine"


def test_the_command_names_the_new_place(places):
    begin()
    os.rename("runs/a", "runs/b")
    moved = places / "here/runs/b"
    done = run_armd("train", "--config", moved / "config.yaml", "--dry-run", "--cluster", "local")
    assert done.returncode == 0, done.stderr
    assert f"run_dir: {moved}\n" in done.stdout
    assert "--- train" not in done.stdout
    assert RunDirectory.of_config(moved / "config.yaml") == RunDirectory(moved)


def test_a_tilde_is_the_home_directory(places, monkeypatch):
    """Not a directory of this name in the working directory."""
    monkeypatch.setenv("HOME", str(places))
    config = RunConfig.model_validate({"run_dir": "~/runs/a", "data": {"directory": "~/data"}})
    assert (config.directory, config.data_directory) == (places / "runs/a", places / "data")
    assert config.run_directory.path == places / "runs/a"
