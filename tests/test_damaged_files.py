"""Files of a run that a crash has torn: what is whole is read, the rest is passed over with a warning."""

import json
import logging

import pytest

from armd_scale import config_files
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.files import append_json_line, read_json, read_json_lines
from armd_scale.run_directory import RunDirectory
from armd_scale.training.telemetry import Lines, MetricsReader, Telemetry
from launchers import restart, status
from tests.conftest import run_armd

FIRST, SECOND = {"step": 1, "time": 1.0}, {"step": 2, "time": 2.0}
WHOLE = json.dumps(FIRST).encode() + b"\n"
ENDS = {
    "half a line": b'{"step": 2, "ti',
    "half a line, then another": b'{"step": 2, "ti\n',
    "zeros": b"\0" * 512,
    "zeros as a line": b"\0\0\n",
    "no UTF-8": b'{"step": "\xff\xfe"}\n',
    "no object": b"null\n",
    "a number": b"12\n",
}


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("armd_scale"), "propagate", True)
    return caplog


@pytest.fixture(params=ENDS)
def torn(request, tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(WHOLE + ENDS[request.param])
    return path


def test_whole_records_are_read(torn, warnings):
    assert read_json_lines(torn) == [FIRST]
    assert warnings.messages == [f"{torn}: 1 damaged lines are ignored"]


def test_nothing_is_lost_behind_a_torn_line(torn):
    append_json_line(torn, SECOND)
    assert read_json_lines(torn) == [FIRST, SECOND]


def test_telemetry_writes_behind_a_torn_line(torn):
    lines = Lines(torn)
    for record in (SECOND, FIRST):
        lines.write(record)
    lines.close()
    assert read_json_lines(torn) == [FIRST, SECOND, FIRST]


def test_zeros_before_a_record_are_not_the_record(tmp_path):
    (tmp_path / "file").write_bytes(b"\0\0" + WHOLE)
    assert read_json_lines(tmp_path / "file") == [FIRST]


def test_a_sound_file_is_read_without_a_word(tmp_path, warnings):
    path = tmp_path / "file"
    assert read_json_lines(path) == []
    append_json_line(path, FIRST)
    append_json_line(path, SECOND)
    assert path.read_bytes() == WHOLE + json.dumps(SECOND).encode() + b"\n"
    assert read_json_lines(path) == [FIRST, SECOND]
    assert warnings.messages == []


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\0\0", "null"])
def test_damaged_objects_are_passed_over(content, tmp_path, warnings):
    path = tmp_path / "file"
    assert read_json(path) is None
    assert warnings.messages == []
    path.write_text(content)
    assert read_json(path) is None
    assert warnings.messages == [f"{path} is damaged and ignored: it holds {len(content)} bytes but no JSON object"]


@pytest.fixture
def run(tmp_path):
    """A run directory with damage in every file that a job writes while it runs."""
    config = RunConfig.model_validate({"run_dir": str(tmp_path), "report": {"wandb": "disabled"}})
    run = config.run_directory
    config_files.save(config, run.config_path)
    record = {
        "step": 5, "loss": 2.0, "bits_per_byte": 3.0, "phase": "left_to_right", "streams": 1, "shuffled": 0,
        "tokens_per_second": 1.0, "seconds_per_step": 1.0,
    }  # fmt: skip
    for path in (run.metrics_path, run.restarts_path, run.heartbeat_path(0), run.summary_path):
        path.parent.mkdir(exist_ok=True)
    run.metrics_path.write_bytes(json.dumps(record).encode() + b"\n\0\0\0\0")
    run.restarts_path.write_bytes(b'{"time": 1.5, "st')
    run.heartbeat_path(0).write_bytes(b"")
    run.heartbeat_path(1).write_text(json.dumps({"rank": 1, "host": "here", "step": 4, "time": 1.0}))
    run.summary_path.write_bytes(b"")
    return config


def test_status_of_a_damaged_run(run):
    done = run_armd("status", run.directory)
    assert done.returncode == 0, done.stderr
    assert "step 5/" in done.stdout
    assert "Traceback" not in done.stderr


def test_status_says_what_it_passes_over(run, warnings):
    assert len(status.lines(run.run_directory)) == 2
    for name in ("metrics.jsonl: 1 damaged lines", "restarts.jsonl: 1 damaged lines", "rank-00000.json is damaged"):
        assert f"{name} " in warnings.text


def test_a_damaged_run_restarts(run):
    """A decision about a restart counts again after the torn one."""
    decision = restart.decide(run, "train", "1", 137)
    assert decision.wait == run.cluster.backoff_seconds
    assert [record["reached"] for record in run.run_directory.restarts()] == [5]
    assert run.run_directory.summary() is None


def test_a_damaged_run_is_followed_and_resumed(run):
    reader = MetricsReader(run.run_directory)
    assert [record["step"] for record in reader.read()] == [5]
    telemetry = Telemetry(run, active=True, first_step=5)
    telemetry.write({"step": 6})
    telemetry.close()
    assert [record["step"] for record in reader.read()] == [6]
    assert run.run_directory.metrics_path.read_bytes().count(b"\n") == 2


def test_a_damaged_list_of_shards_is_refused(tmp_path):
    """Ignored, it would change the samples of all later steps."""
    run = RunDirectory(tmp_path)
    run.left_out_path.write_text("")
    with pytest.raises(UserError, match="restore it, or remove it"):
        run.damaged_shards()
