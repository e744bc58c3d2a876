"""Metrics of a run on a full disk, and without wandb."""

import errno
import json
import random

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
