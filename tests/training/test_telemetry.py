"""Metrics of a run on a full disk, and without wandb."""

import errno
import json
import random

import pytest

from armd_scale import logs
from armd_scale.config import RunConfig
from armd_scale.run_directory import RunDirectory
from armd_scale.training import telemetry


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
    assert capsys.readouterr().out.count("the network is gone") == 1


@pytest.mark.parametrize(
    ("field", "variable", "mode"),
    [
        ("auto", None, "offline"),
        ("auto", "disabled", None),
        ("auto", "DRYRUN", "offline"),
        ("offline", "online", "offline"),
        ("disabled", "online", None),
    ],
)
def test_the_mode_of_wandb(tmp_path, monkeypatch, field, variable, mode):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", variable) if variable else monkeypatch.delenv("WANDB_MODE", raising=False)
    config = RunConfig.model_validate({"run_dir": str(tmp_path), "report": {"wandb": field}})
    monkeypatch.setattr(telemetry, "_init", lambda _config, mode: mode)
    assert telemetry._start_wandb(config) == mode


def test_a_server_of_wandb_that_cannot_be_reached(tmp_path, monkeypatch, capsys):
    """The run is recorded offline; later jobs continue it under the same id, with the project of the environment."""
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(telemetry, "_WANDB_SECONDS", 1.0)
    logs.configure(0)
    config = RunConfig.model_validate({"run_dir": str(tmp_path), "name": "x"})
    ids = []
    for step in (1, 2):
        writer = telemetry.Telemetry(config, active=True, first_step=0)
        writer.write({"step": step})
        ids.append((writer._wandb.id, writer._wandb.project, writer._wandb.name))
        writer.close()
        monkeypatch.setenv("WANDB_MODE", "offline")
    assert ids[0] == ids[1]
    assert ids[0][1:] == ("mine", "x")
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    assert capsys.readouterr().out.count("wandb is not reachable") == 1
