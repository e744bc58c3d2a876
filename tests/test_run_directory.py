"""The run directory knows the name of every file, and no other module does."""

import ast
import json
import re
from pathlib import Path

import pytest

from armd_scale import config_files
from armd_scale.config import RunConfig
from armd_scale.data.shards import fill_vocabulary
from armd_scale.errors import UserError
from armd_scale.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for package in ("armd_scale", "data_pipeline", "launchers", "tools")
    for path in sorted((ROOT / package).rglob("*.py"))
]
FILES = (
    "config.yaml", "environment.json", ".lock", "metrics.jsonl", "left_out.json", "attention.json", "jobs.json",
    "error.json", "restarts.jsonl", "summary.json", "samples.md", "loss.png", "manifest.json", "_result.pkl", "_log.",
)  # fmt: skip
DIRECTORIES = (
    "code", "data", "checkpoints", "heartbeats", "stacks", "samples", "jobs", "export", "profiles", "step-", "rank-",
)  # fmt: skip
PATTERNS = {  # whole words; "samples.md" is not the directory "samples"
    **{name: rf"(?<!\w){re.escape(name)}(?!\w)" for name in FILES},
    **{name: rf"(?<!\w){name}(?![\w.])" for name in DIRECTORIES},
    **{name: re.escape(name) for name in ("_result.pkl", "_log.", "step-", "rank-")},
}
OTHER_DIRECTORIES = {
    ("fidelity", ".lock"): "of a study",
    ("fidelity", "data"): "of a study",
    ("study_page", "loss.png"): "a page of a study",
    ("faults", "data"): "data.directory of its runs",
    ("prepare", ".lock"): "beside prepared data",
}


def test_each_name_is_spelt_in_the_class():
    found = {
        (path.stem, name)
        for path in SOURCES
        if path.stem != "run_directory"
        for name in _names(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == OTHER_DIRECTORIES.keys()


def test_the_class_spells_each_name_once():
    tree = ast.parse((ROOT / "armd_scale" / "run_directory.py").read_text(encoding="utf-8"))
    text = [node.value for node in _constants(tree)]
    for name in FILES + DIRECTORIES:
        spelt = [part for part in text if re.search(PATTERNS[name], part)]
        assert len(spelt) <= 2 if name in ("step-", "rank-") else len(spelt) == 1, name


def _names(tree):
    """Names of a run's files and directories in the string constants of a module."""
    in_paths = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            in_paths |= {id(part) for part in ast.walk(node.right)}
    for node in _constants(tree):
        for name in FILES:
            if re.search(PATTERNS[name], node.value):
                yield name
        for name in DIRECTORIES:
            in_path = id(node) in in_paths and re.match(PATTERNS[name], node.value)
            if in_path or f"/{name}/" in node.value:
                yield name


def _constants(tree):
    """String constants, without the docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node


def test_the_scan_sees_what_it_should():
    source = """
'''checkpoints/ of a docstring'''
a = folder / "checkpoints" / f"step-{step:08d}"
b = folder / "checkpointsfolder"
c = f"{folder} has no metrics.jsonl"
d = {"samples": 1, "data": "export"}
e = folder.glob("*/jobs/*")
f = f"{job}_0_log.out"
"""
    assert sorted(_names(ast.parse(source))) == ["_log.", "checkpoints", "jobs", "metrics.jsonl", "step-"]


def test_a_run_directory_is_found_from_inside(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(UserError, match="no config.yaml"):
        config_files.load_run(run)
    run.checkpoint(4).mkdir(parents=True)
    config = RunConfig(name="some", run_dir="elsewhere")
    config_files.save(config, run.config_path)
    assert config_files.load_run(run) == config.model_copy(update={"run_dir": str(run.path)})
    for path in (run.path, run.export, run.checkpoint(4)):
        assert RunDirectory.around(path) == run
    assert RunDirectory.around(tmp_path) is None
    with pytest.raises(UserError, match="not a complete data set"):
        fill_vocabulary(config_files.load_run(run))


def test_checkpoints_are_listed_by_their_steps(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.newest_checkpoint() is None
    for step in (200_000_000, 8, 16):
        run.checkpoint(step).mkdir(parents=True)
        run.manifest_path(run.checkpoint(step)).write_text("{}")
    run.checkpoint(24).mkdir()
    run.partial_checkpoint(32).mkdir()
    damaged = run.damaged_checkpoint(run.checkpoint(40))
    damaged.mkdir()
    run.manifest_path(damaged).write_text("{}")
    assert [run.step_of(path) for path in run.complete_checkpoints()] == [8, 16, 200_000_000]
    assert run.newest_checkpoint() == run.checkpoint(200_000_000)
    with pytest.raises(ValueError, match="name of a checkpoint"):
        run.step_of(damaged)


def test_records_are_read_while_they_are_written(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.metrics() == run.heartbeats() == run.restarts() == run.sample_logs() == []
    assert run.stacks() == run.damaged_shards() == {}
    assert run.summary() is None
    assert run.error("train", "1") is None
    run.metrics_path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert run.metrics() == [{"step": 1}, {"step": 2}]
    for rank in (1, 0, 100_000):
        for path, text in (
            (run.heartbeat_path(rank), json.dumps({"rank": rank})),
            (run.stack_path(rank), "Timeout" * rank),
            (run.sample_log_path(rank), json.dumps({"time": -rank}) + "\n{"),
        ):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    run.heartbeat_path(0).with_suffix(".partial").write_text("")
    (run.stack_path(0).parent / "20261127-rank-00002.txt").write_text("of an earlier job")
    assert [beat["rank"] for beat in run.heartbeats()] == [0, 1, 100_000]
    assert run.stacks() == {rank: run.stack_path(rank) for rank in (1, 100_000)}
    assert [record["time"] for record in run.sample_logs()] == [-100_000, -1, 0]
