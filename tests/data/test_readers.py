"""Documents from files of every format."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from armd_scale.data import readers
from armd_scale.errors import UserError

TEXTS = [
    "First document.\n",
    "Zweites, mit Umlauten: \u00e4\u00f6\u00fc \u2014 \u4f60\u597d \U0001f600",
    "  indented\n\tand tabs\n\n",
]


@pytest.fixture
def folder(tmp_path):
    """The same documents in every format."""
    lines = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3]}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text(TEXTS[0], encoding="utf-8")
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"])
def test_every_format_gives_the_documents(folder, name):
    assert list(readers.documents([str(folder / name)])) == TEXTS


def test_folders_and_globs(folder):
    assert list(readers.documents([str(folder)])) == TEXTS * 4 + TEXTS[:1]
    assert list(readers.documents([str(folder / "*.jsonl*")])) == TEXTS * 3


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        pytest.param("x.jsonl", b'{"text": "ok"}\n{"text": \n', "line 2 is not a JSON object", id="cut-line"),
        pytest.param("x.jsonl", b'{"body": "ok"}\n', "line 1 .* field 'text'", id="other-field"),
        pytest.param("x.jsonl", b"[1]\n", "line 1 is not a JSON object", id="list"),
        pytest.param("x.jsonl", b'{"text": 3}\n', "field 'text' is not text", id="number"),
        pytest.param("x.jsonl", b'{"text": "\\ud800"}\n', "surrogate", id="surrogate"),
        pytest.param("x.jsonl", b"[" * 100_000 + b"\n", "line 1 is not a JSON object", id="deep-nesting"),
        pytest.param(
            "x.txt.gz",
            gzip.compress(bytes(range(256)) * 40, mtime=0)[:60] + b"\x00" * 40,
            "cannot be read",
            id="damaged-gzip",
        ),
        pytest.param("x.txt", b"\xff\xfe\x00", "is not UTF-8", id="utf-16"),
        pytest.param("x.txt.gz", b"not gzip", "cannot be read", id="no-gzip"),
        pytest.param("x.txt.gz", gzip.compress(b"a" * 1000, mtime=0)[:-9], "cannot be read", id="cut-gzip"),
        pytest.param("x.jsonl.zst", b"not zstd", "cannot be read", id="no-zstd"),
        pytest.param("x.parquet", b"PAR1", "cannot be read", id="cut-parquet"),
        pytest.param("x.doc", b"\xd0\xcf\x11\xe0", "is not UTF-8", id="doc"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=line) as error:
        list(readers.documents([str(tmp_path / name)]))
    assert name in str(error.value)


def test_a_truncated_zst_is_not_taken_for_a_short_one(tmp_path):
    whole = zstandard.compress(json.dumps({"text": "x" * 5000}).encode() + b"\n" + b'{"text": "y"}\n' * 3000)
    (tmp_path / "x.jsonl.zst").write_bytes(whole[: len(whole) - 5])
    with pytest.raises(UserError, match="cannot be read"):
        list(readers.documents([str(tmp_path / "x.jsonl.zst")]))


@pytest.mark.parametrize("name", ["absent.txt", "."], ids=["absent", "empty-folder"])
def test_no_text_at_a_place(tmp_path, name):
    with pytest.raises(UserError, match="no text at"):
        list(readers.documents([str(tmp_path / name)]))


def test_a_blank_file_has_no_documents(tmp_path):
    (tmp_path / "blank.txt").write_text("  \n")
    assert list(readers.documents([str(tmp_path / "blank.txt")])) == []


def test_a_parquet_column_that_is_no_text(folder):
    with pytest.raises(UserError, match="column 'n' is int64"):
        list(readers.documents([str(folder / "d.parquet")], "n"))


def test_a_parquet_column_that_is_not_there(folder):
    with pytest.raises(UserError, match=r"no column 'body'; its columns: text, n"):
        list(readers.documents([str(folder / "d.parquet")], "body"))


def test_the_text_that_python_carries():
    documents = readers.python_documents()
    joined = "".join(documents)
    assert len(joined) > 1_500_000
    assert 'The "if" statement is used for conditional execution' in joined
    assert "def dumps(" in joined
    assert len(set(documents)) == len(documents)


def test_a_file_counts_once_and_its_name_is_no_pattern(tmp_path):
    odd = tmp_path / "a[1].txt"
    odd.write_text("only once\n")
    assert list(readers.documents([str(odd), str(odd), str(tmp_path / "*.txt")])) == ["only once\n"]
