"""Documents from files of every format."""

import bz2
import errno
import gzip
import io
import json
import lzma
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

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


def write_tar(path, members, links=()):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, target
            archive.addfile(member)


def read(path, **fields):
    fields = readers.Fields(**fields)
    return [record for part in readers.parts([str(path)], fields) for record in readers.read(part, fields)]


def test_every_member_of_a_tar_is_read_or_counted(tmp_path):
    members = {"a.txt": b"a text", "b.json": b'[{"text": "b"}]', "c.bin": b"\0", "d.TXT": b"d", "._a.txt": b"\0"}
    write_tar(tmp_path / "x.tar", members, links=[("hard.txt", "a.txt"), ("lost.txt", "nowhere.txt")])
    records = read(tmp_path / "x.tar")
    assert [record.text for record in records if record.text] == ["a text", "b", "d", "a text"]
    assert [record.place.rpartition("/")[2] for record in records if record.ignored] == ["c.bin", "._a.txt"]
    (bad,) = (record for record in records if record.problem and not record.ignored)
    assert "lost.txt" in bad.place
    assert "link" in bad.problem


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress, lzma.compress, bz2.compress])
def test_archives_in_a_row(tmp_path, pack):
    ending = {gzip.compress: ".gz", zstandard.compress: ".zst", lzma.compress: ".xz", bz2.compress: ".bz2"}
    write_tar(tmp_path / "one", {"a.txt": b"a" * 1000, "b.txt": b"b"})
    write_tar(tmp_path / "two", {"c.jsonl": b'{"text": "c"}\n'})
    both = (tmp_path / "one").read_bytes() + (tmp_path / "two").read_bytes()
    path = tmp_path / f"x.tar{ending.get(pack, '')}"
    path.write_bytes(pack(both))
    assert list(readers.documents([str(path)])) == ["a" * 1000, "b", "c"]
    path.write_bytes(pack(both[:1600]))
    with pytest.raises(UserError, match="cannot be read"):
        list(readers.documents([str(path)]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("x.txt", b"\xef\xbb\xbftext", id="txt"),
        pytest.param("x.jsonl", b'\xef\xbb\xbf{"text": "text"}\n', id="jsonl"),
        pytest.param("x.json", b'\xef\xbb\xbf[{"text": "text"}]', id="json"),
        pytest.param("x", b'\xef\xbb\xbf{"text": "text"}\n', id="no-ending"),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(readers.documents([str(tmp_path / name)])) == ["text"]


def test_null_is_an_empty_text_in_every_format(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": null}\n{"text": "a"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, "a"]}), tmp_path / "x.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2)}), tmp_path / "null.parquet")
    for name, texts in (("x.jsonl", ["", "a"]), ("x.parquet", ["", "a"]), ("null.parquet", ["", ""])):
        records = read(tmp_path / name)
        assert [record.text for record in records] == texts
        assert not any(record.problem for record in records)


@pytest.mark.parametrize(
    "kind",
    [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), "string")],
    ids=str,
)
def test_every_kind_of_text_column(tmp_path, kind):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(TEXTS).cast(kind)}), tmp_path / "x.parquet")
    assert list(readers.documents([str(tmp_path / "x.parquet")])) == TEXTS


def test_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="2 columns named 'text'"):
        list(readers.documents([str(tmp_path / "x.parquet")]))
    other = pyarrow.Table.from_arrays(
        [pyarrow.array([1]), pyarrow.array([2]), pyarrow.array(["c"])], ["n", "n", "text"]
    )
    pyarrow.parquet.write_table(other, tmp_path / "y.parquet")
    assert list(readers.documents([str(tmp_path / "y.parquet")])) == ["c"]


def test_a_long_number_in_another_field_does_no_harm(tmp_path):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a", "n": {"7" * 5000}}}\n')
    assert list(readers.documents([str(tmp_path / "x.jsonl")])) == ["a"]


@pytest.mark.parametrize("size", [7, 1 << 20], ids=["many-parts", "one-part"])
@pytest.mark.parametrize(
    ("kind", "content", "documents"),
    [
        pytest.param("line", b"a\r\nb\n\nc", ["a", "b", "c"], id="line"),
        pytest.param("paragraph", b"a\nb\n\n\n\nc\n", ["a\nb", "c"], id="paragraph"),
        pytest.param("paragraph", b"a\r\nb\r\n\r\nc\r\n", ["a\r\nb", "c"], id="paragraph-of-windows"),
        pytest.param("<|endoftext|>", b"a\n<|endoftext|>\nb\n\nb<|endoftext|>c", ["a", "b\n\nb", "c"], id="separator"),
        pytest.param("---", b"a----b---", ["a", "-b"], id="separator-that-overlaps"),
        pytest.param("file", b"a\n\nb\n", ["a\n\nb\n"], id="file"),
    ],
)
def test_documents_of_a_txt_file(tmp_path, monkeypatch, kind, content, documents, size):
    monkeypatch.setattr(readers, "PART_BYTES", size)
    (tmp_path / "x.txt").write_bytes(content)
    (tmp_path / "y.txt.gz").write_bytes(gzip.compress(content))
    for name in ("x.txt", "y.txt.gz"):
        assert [record.text for record in read(tmp_path / name, txt=kind) if record.text] == documents


@given(st.lists(st.text(alphabet="ab\n-", max_size=9), max_size=30), st.integers(1, 20))
def test_separators_at_the_borders_of_reads(pieces, size):
    class Slow(io.BytesIO):
        def read(self, _=-1):
            return super().read(size)

    content = "<->".join(pieces).encode()
    found = list(readers._separated(Slow(content), (b"<->",)))
    assert found == content.split(b"<->")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        pytest.param(OSError(errno.EIO, "Input/output error"), OSError, id="device"),
        pytest.param(TimeoutError(errno.ETIMEDOUT, "timed out"), OSError, id="network"),
        pytest.param(PermissionError(errno.EACCES, "Permission denied"), UserError, id="permission"),
        pytest.param(OSError("Invalid data stream"), UserError, id="damage"),
    ],
)
def test_faults_that_can_pass_are_no_bad_input(tmp_path, monkeypatch, error, kind):
    (tmp_path / "x.txt").write_text("a")

    def fail(*_):
        raise error

    monkeypatch.setattr(readers.sources, "open_file", fail)
    with pytest.raises(kind, match="x.txt cannot be read") as raised:
        list(readers.documents([str(tmp_path / "x.txt")]))
    assert isinstance(raised.value, UserError) == (kind is UserError)
