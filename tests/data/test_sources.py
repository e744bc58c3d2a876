"""Which files a list of sources means, and what their format is."""

import gzip
import http.server
import io
import json
import os
import tarfile
import threading
import zipfile
from functools import partial

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from armd_scale.data import readers, sources
from armd_scale.data.sources import Format
from armd_scale.errors import UserError

LINES = b'{"text": "one"}\n{"text": "two"}\n'
ARRAY = b'[\n {"text": "one"},\n {"text": "two"}\n]\n'


def tar(**members):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return content.getvalue()


def parquet(texts):
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), content)
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "format_"),
    [
        pytest.param("x.json", ARRAY, Format("json"), id="array"),
        pytest.param("x.json", LINES, Format("jsonl"), id="lines-named-json"),
        pytest.param("x.json.gz", gzip.compress(LINES), Format("jsonl", "gz"), id="json-gz"),
        pytest.param("x.JSONL", LINES, Format("jsonl"), id="capitals"),
        pytest.param("x.ndjson", LINES, Format("jsonl"), id="ndjson"),
        pytest.param("x.jsonl-00000-of-00001", LINES, Format("jsonl"), id="numbered"),
        pytest.param("x-00000-of-00001.parquet", parquet(["one", "two"]), Format("parquet"), id="numbered-parquet"),
        pytest.param("x.jsonl?download=true", LINES, Format("jsonl"), id="query"),
        pytest.param("x.tar.gz", gzip.compress(tar(a_jsonl=LINES)), Format("tar", "gz"), id="tar-gz"),
        pytest.param("x.tgz", gzip.compress(tar(a_jsonl=LINES)), Format("tar", "gz"), id="tgz"),
        pytest.param("x.tar.zst", zstandard.compress(tar(a_jsonl=LINES)), Format("tar", "zst"), id="tar-zst"),
        pytest.param("x", LINES, Format("jsonl"), id="lines-without-name"),
        pytest.param("x.data", gzip.compress(LINES), Format("jsonl", "gz"), id="packed-without-name"),
        pytest.param("x.part1", zstandard.compress(LINES), Format("jsonl", "zst"), id="zst-without-name"),
        pytest.param("x", parquet(["one", "two"]), Format("parquet"), id="parquet-without-name"),
        pytest.param("x", tar(a_jsonl=LINES), Format("tar"), id="tar-without-name"),
    ],
)
def test_a_named_file_is_read_by_its_content(tmp_path, name, content, format_):
    path = tmp_path / name
    path.write_bytes(content)
    assert sources.format_of(str(path)) == format_
    assert list(readers.documents([str(path)])) == ["one", "two"]


def test_other_files_are_text(tmp_path):
    (tmp_path / "x.py").write_text("{not: json}\n")
    assert sources.format_of(str(tmp_path / "x.py")) == Format("txt")


@pytest.fixture
def folder(tmp_path):
    """A directory as people have it."""
    root = tmp_path / "corpus"
    for name in (
        "a.jsonl", "b/c.jsonl", "README.md", "dataset_info.json", "._x.jsonl", ".ipynb_checkpoints/a.jsonl", "d.csv"
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(LINES)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/e.jsonl").write_bytes(LINES)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "b/back").symlink_to(root)
    return root


def relative(root, names):
    return [name.removeprefix(f"{root}/") for name in names]


def test_a_directory_yields_its_text_and_names_the_rest(folder):
    found = sources.expand([str(folder)])
    assert relative(folder, found.names) == ["a.jsonl", "b/c.jsonl", "linked/e.jsonl"]
    left_out = {"README.md", "dataset_info.json", "._x.jsonl", ".ipynb_checkpoints/", "d.csv"}
    assert set(relative(folder, found.left_out)) == left_out
    assert "5 files" in sources.describe(found.left_out)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        pytest.param("*", ["a.jsonl"], id="all"),
        pytest.param("*.md", ["README.md"], id="spelt-ending"),
        pytest.param("**/*.jsonl", ["a.jsonl", "b/c.jsonl"], id="recursive"),
    ],
)
def test_a_glob_yields_text_and_the_ending_that_it_spells(folder, pattern, names):
    (folder / "linked").unlink()
    (folder / "b/back").unlink()
    assert relative(folder, sources.expand([f"{folder}/{pattern}"]).names) == names


def test_directories_that_a_glob_matches_are_named(folder):
    assert f"{folder}/b/" in sources.expand([f"{folder}/*"]).left_out


def test_a_dangling_link_is_refused(folder):
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    for source in (folder, folder / "gone.jsonl", folder / "*.jsonl"):
        with pytest.raises(UserError, match=r"gone.jsonl is a link to"):
            sources.expand([str(source)])


def test_a_directory_that_cannot_be_entered_is_refused(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"corpus/b cannot be read \(Permission denied\)"):
        sources.expand([str(folder)])


def test_a_file_of_two_names_is_read_once(folder):
    (folder / "again.jsonl").symlink_to("a.jsonl")
    os.link(folder / "a.jsonl", folder / "hard.jsonl")
    names = [f"{folder}/a.jsonl", f"{folder}/b/../a.jsonl", f"{folder}/again.jsonl", f"{folder}/hard.jsonl"]
    assert sources.expand(names).names == names[:1]


def test_the_home_directory(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert sources.expand(["~/a.jsonl"]).names == [f"{folder}/a.jsonl"]


def test_fingerprints(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one")
    before = {check: sources.fingerprint(str(path), check) for check in ("size", "mtime", "sha256")}
    os.utime(path, ns=(1, 1))
    touched = sources.fingerprint(str(path), "mtime")
    assert sources.unchanged(before["size"], touched, "size")
    assert not sources.unchanged(before["mtime"], touched, "mtime")
    assert sources.unchanged(before["sha256"], touched, "mtime"), "the content decides where it is known"
    assert sources.unchanged(before["mtime"][:2], touched, "mtime"), "version 0.1 recorded the size alone"
    path.write_text("two")
    edited = sources.fingerprint(str(path), "mtime")
    assert not sources.unchanged(before["mtime"], edited, "mtime")
    assert not sources.unchanged(before["sha256"], edited, "mtime")
    os.utime(path, ns=(before["sha256"][2],) * 2)
    hidden = sources.fingerprint(str(path), "sha256")
    assert sources.unchanged(before["mtime"], hidden, "mtime"), "an edit that restores the time needs the hash"
    assert not sources.unchanged(before["sha256"], hidden, "sha256")
    path.write_text("three")
    assert not sources.unchanged(before["size"], sources.fingerprint(str(path), "size"), "size")


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_HEAD(self):
        self.server.heads += 1
        super().do_HEAD()

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """A web server of ``tmp_path``."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(tmp_path)))
    server.heads = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.jsonl", LINES, id="jsonl"),
        pytest.param("a[1].jsonl", LINES, id="brackets"),
        pytest.param("a.jsonl.gz", gzip.compress(LINES), id="gz"),
        pytest.param("a.parquet", parquet(["one", "two"]), id="parquet"),
        pytest.param("a.json", ARRAY, id="json"),
    ],
)
def test_files_of_a_web_server(served, tmp_path, name, content):
    pytest.importorskip("aiohttp")
    (tmp_path / name).write_bytes(content)
    assert list(readers.documents([f"http://127.0.0.1:{served.server_port}/{name}"])) == ["one", "two"]


def test_a_missing_file_of_a_web_server(served):
    pytest.importorskip("aiohttp")
    with pytest.raises(UserError, match=r"no text at|cannot be opened"):
        list(readers.documents([f"http://127.0.0.1:{served.server_port}/none.jsonl"]))


def test_chained_urls(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a.jsonl", LINES)
        archive.writestr("b/c.jsonl", LINES)
    chain = f"::file://{tmp_path}/z.zip"
    assert list(readers.documents([f"zip://a.jsonl{chain}"])) == ["one", "two"]
    assert list(readers.documents([f"zip://*.jsonl{chain}"])) == ["one", "two"]
    assert sources.expand([f"zip://b/{chain}"]).names == [f"zip://b/c.jsonl{chain}"]


class _Plain(io.RawIOBase):
    """A file as s3fs, gcsfs and the Hugging Face hub give: ``readline`` takes no limit."""

    def __init__(self, content):
        self._content = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self._content.readinto(buffer)

    def readline(self):
        return self._content.readline()


def test_remote_files_without_a_limit_of_lines(monkeypatch):
    class System:
        def open(self, path, mode):
            return _Plain(LINES)

    monkeypatch.setattr(sources.fsspec.core, "url_to_fs", lambda url: (System(), url))
    part = readers.Part("s3://bucket/a.jsonl", 0, -1, 0, "jsonl")
    assert [record.text for record in readers.read(part)] == ["one", "two"]


def test_a_long_window_of_zst(tmp_path):
    content = b"".join(json.dumps({"text": f"{n} " * 50}).encode() + b"\n" for n in range(20_000))
    settings = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.ZstdCompressor(compression_params=settings).compress(content))
    assert sum(1 for _ in readers.documents([str(tmp_path / "x.jsonl.zst")])) == 20_000


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "run git lfs pull"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "run git lfs pull"),
        ("x.arrow", b"ARROW1\0\0" + bytes(100), "is binary, in no known format"),
        ("x.zip", b"PK\x03\x04" + bytes(100), "is binary, in no known format"),
    ],
)
def test_files_that_hold_no_text(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=line):
        sources.format_of(str(tmp_path / name))
