"""Lines of a job: their form, which ranks print them, and a full disk."""

import errno
import logging
import re
import sys

import pytest

from armd_scale import logs


@pytest.fixture(autouse=True)
def clean():
    yield
    logging.getLogger("armd_scale").removeHandler(logs._PRINTER)


def test_a_line_has_time_level_rank_and_topic(capsys):
    logs.configure(0)
    logs.TRAIN.info("resumed from %s", "x: y")
    line = capsys.readouterr().out
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO rank 0 train: resumed from x: y\n", line)
    assert logs.parse(line.rstrip())[1:] == ("INFO", 0, "train", "resumed from x: y")
    logs.configure()
    logs.JOB.error("no")
    assert logs.parse(capsys.readouterr().out.rstrip())[1:] == ("ERROR", None, "job", "no")
    for text in ("", "data: x", "2026-11-27 18:30:01 NOTICE rank 0 data: x", "2026-11-27 18:30:01 INFO data x"):
        assert logs.parse(text) is None


def test_other_ranks_print_warnings_and_errors(capsys):
    logs.configure(3)
    logs.TRAIN.info("quiet")
    logs.TRAIN.warning("loud")
    assert [logs.parse(line)[1:] for line in capsys.readouterr().out.splitlines()] == [("WARNING", 3, "train", "loud")]


def test_other_loggers_stay_as_they_are(capsys):
    before = logging.getLogger().handlers[:], logging.getLogger().level
    logs.configure(0)
    logging.getLogger("other").info("quiet")
    assert capsys.readouterr() == ("", "")
    assert before == (logging.getLogger().handlers[:], logging.getLogger().level)


def test_some_lines_are_printed_once(capsys):
    logs.configure(0)
    for _ in range(3):
        logs.TRAIN.warning("the disk is full", extra=logs.ONCE)
        logs.TRAIN.warning("again")
    out = capsys.readouterr().out
    assert out.count("the disk is full") == 1
    assert out.count("again") == 3


def test_a_full_disk_loses_no_line(capsys, monkeypatch):
    logs.configure(0)
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", _full)
        logs.TRAIN.info("one")
        logs.TRAIN.info("two")
    assert capsys.readouterr().out == ""
    logs.TRAIN.info("three")
    assert [logs.parse(line).message for line in capsys.readouterr().out.splitlines()] == ["one", "two", "three"]


def _full(text):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_nothing_raises(capsys, monkeypatch):
    logs.configure(0)
    logs._PRINTER.handle(logging.LogRecord("armd_scale.train", logging.INFO, "", 0, "%d", ("no number",), None))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", open("/dev/null", "w", encoding="ascii"))  # noqa: SIM115
        logs.TRAIN.info("µ")
        sys.stdout.close()
        logs.TRAIN.info("closed")
    logs.TRAIN.info("open")
    assert logs.parse(capsys.readouterr().out.rstrip()).message == "open"
