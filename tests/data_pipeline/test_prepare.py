"""Preparation as a whole: nothing depends on who does the work, nothing is lost silently, interruptions cost little."""

import argparse
import collections
import gzip
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from armd_scale.config import RunConfig
from armd_scale.data import readers, shards
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.shards import PackedDataset
from armd_scale.data.stream import Mixture, open_mixture
from armd_scale.errors import UserError
from armd_scale.training import samples
from data_pipeline import documents, inspect, units
from data_pipeline import prepare as preparing
from data_pipeline.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "äöü", "你好"]


def config(folder, text, **data):
    return RunConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "model": {"length": 16},
            "orders": {"rho": 8},
            "data": {
                "text": [str(text)], "directory": str(folder), "vocab_size": 290, "heldout_fraction": 0.2,
                "samples_per_shard": 32, "workers": 1, **data,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of several lengths, some of them twice."""
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 60))) for _ in range(700)]
    documents += documents[:80]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), encoding="utf-8")
    return path


@pytest.fixture
def small_parts(monkeypatch):
    """Units of two kilobytes, and other processes for any amount of work."""
    monkeypatch.setattr(readers, "PART_BYTES", 2000)
    monkeypatch.setattr(units, "PART_BYTES", 2000)
    monkeypatch.setattr(preparing, "_SMALL", 0)


def content(folder):
    """All files of a prepared directory but the settings, which name the source."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "complete.json"
    }


def texts(folder, split):
    """The documents of a split, decoded from its shards."""
    data, tokenizer = PackedDataset(folder / split), tokenizers.load(folder / "tokenizer")
    stream = np.concatenate([data.read(np.arange(len(data))).reshape(-1), data.tail()]).tolist()
    found, start = [], 0
    for at, token in enumerate(stream):
        if token == tokenizer.eos_id:
            found.append(tokenizer.decode(stream[start:at]))
            start = at + 1
    return found


def test_the_result_does_not_depend_on_processes_or_pieces(text, tmp_path, monkeypatch):
    preparing.prepare(config(tmp_path / "one", text))
    expected = content(tmp_path / "one")
    for size, workers in ((2000, 1), (777, 3), (2000, 3)):
        monkeypatch.setattr(readers, "PART_BYTES", size)
        monkeypatch.setattr(units, "PART_BYTES", size)
        monkeypatch.setattr(preparing, "_SMALL", 0)
        folder = tmp_path / f"{size}-{workers}"
        preparing.prepare(config(folder, text, workers=workers))
        assert content(folder) == expected, (size, workers)
    written = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    got = texts(tmp_path / "one", "train") + texts(tmp_path / "one", "heldout")
    assert sorted(got) == sorted(written)
    held = set(texts(tmp_path / "one", "heldout"))
    assert texts(tmp_path / "one", "train") == [one for one in written if one not in held]


def test_borders_of_documents_are_kept(text, tmp_path):
    """The first tokens of documents, which stand behind an EOS."""
    preparing.prepare(config(tmp_path / "data", text))
    for split in ("train", "heldout"):
        data, every = PackedDataset(tmp_path / "data" / split), []
        numbers = np.arange(len(data))
        tokens, flags = data.read(numbers).ravel(), data.flags(numbers, shards.DOCUMENTS).ravel()
        behind = np.concatenate([[True], tokens[:-1] == data.index["eos_id"]])
        assert np.array_equal(flags, behind)
        assert flags.sum() > 10
        spanning = [row for row in documents.inside(data.folder, 1, 16) if row["start"] < 16]
        assert spanning, "the first sample ends in a document"
        for sequence in data.sequences(numbers, True) + data.tail_sequences(True):
            assert data.index["eos_id"] not in sequence[:-1]
            every += sequence.tolist()
        assert every == [*tokens.tolist(), *data.tail().tolist()]


@pytest.mark.parametrize("deduplicate", [False, True])
def test_documents_are_packed_by_best_fit(text, tmp_path, small_parts, capsys, deduplicate):
    """Whole documents where they fit, none lost; whoever does the work; padding does not count and is reported."""
    settings = {"pack": "best-fit", "deduplicate": deduplicate}
    preparing.prepare(config(tmp_path / "one", text, **settings))
    shared = config(tmp_path / "shared", text, **settings)
    assert preparing.step(shared, "begin")
    for name in ("tokenise", "pack"):
        for share in (2, 0, 1, 2):
            preparing.step(shared, name, share, 3)
        preparing.step(shared, {"tokenise": "merge", "pack": "finish"}[name])
    assert content(tmp_path / "shared") == content(tmp_path / "one")
    preparing.prepare(config(tmp_path / "stream", text, deduplicate=deduplicate))
    inspect.run(argparse.Namespace(folder=tmp_path / "one", samples=2, picture=None))
    printed = capsys.readouterr().out
    for split in ("train", "heldout"):
        data = PackedDataset(tmp_path / "one" / split)
        eos = data.index["eos_id"]
        numbers = np.arange(len(data))
        tokens, counted = data.read(numbers), data.flags(numbers, shards.LOSS)
        assert data.index["counted"] == counted.sum() == data.index["tokens"] - data.index["padding"]
        assert (tokens[~counted] == eos).all()
        found = collections.Counter()
        pieces = [piece for piece in data.sequences(numbers, True) if piece.tolist() != [eos] * len(piece)]
        whole = [tuple(piece.tolist()) for piece in pieces if len(piece) < 16 or piece[-1] == eos]
        original = PackedDataset(tmp_path / "stream" / split)
        stream = np.concatenate([original.read(np.arange(len(original))).ravel(), original.tail()])
        expected = np.split(stream, np.flatnonzero(stream == eos)[:-1] + 1)
        cut = [one for one in expected if len(one) > 16]
        assert data.index["cut_documents"] == len(cut) > 0
        found = collections.Counter(whole)
        assert not collections.Counter(tuple(one.tolist()) for one in expected if len(one) <= 16) - found
        assert sorted(tokens[counted].tolist()) == sorted(stream.tolist())
        assert f"{len(cut) / len(expected):.1%} of the documents are cut" in printed
        assert f"{data.index['padding'] / data.index['tokens']:.2%} of the tokens are padding" in printed
        rows = pyarrow.parquet.read_table(data.folder / "documents.parquet").to_pylist()
        assert sum(row["tokens"] for row in rows if row["source"] == "padding") == data.index["padding"]
        assert data.index["sources"]["padding"] == data.index["padding"]
        for row in rows:
            part = tokens.ravel()[row["start"] : row["start"] + row["tokens"]]
            assert counted.ravel()[row["start"]] == (row["source"] != "padding")
            assert len(part) == row["tokens"]
        assert data.index["bytes"] == original.index["bytes"] == sum(row["bytes"] for row in rows)


def test_jobs_share_the_steps(text, tmp_path, small_parts):
    """Every share by itself, in any order, some of them twice: the same directory."""
    preparing.prepare(config(tmp_path / "one", text, deduplicate=True))
    shared = config(tmp_path / "shared", text, deduplicate=True)
    assert preparing.step(shared, "begin")
    for name in ("tokenise", "pack"):
        for share in (2, 0, 1, 2):
            preparing.step(shared, name, share, 3)
        preparing.step(shared, {"tokenise": "merge", "pack": "finish"}[name])
    assert content(tmp_path / "shared") == content(tmp_path / "one")
    assert not preparing.step(shared, "begin")


def test_ids_and_sources_are_kept(tmp_path, small_parts):
    """Where every token comes from: the table of documents against the tokens, and the index of every shard."""
    named = [{"text": f"document {n} of {'many ' * (n % 9)}words", "id": n, "source": "ab"[n % 2]} for n in range(120)]
    (tmp_path / "named.jsonl").write_text("\n".join(map(json.dumps, named)))
    (tmp_path / "plain.jsonl").write_text("\n".join(json.dumps({"text": f"plain {n} text"}) for n in range(60)))
    table = pyarrow.table({"text": [f"a row {n}" for n in range(50)], "key": [f"k{n}" for n in range(50)]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    folder = tmp_path / "data"
    preparing.prepare(config(folder, tmp_path / "*.[jp]*", heldout_fraction=0.3))
    for split in ("train", "heldout"):
        data = PackedDataset(folder / split)
        rows = pyarrow.parquet.read_table(folder / split / "documents.parquet").to_pylist()
        expected = texts(folder, split)
        by_text = {one["text"]: one for one in named}
        assert len(rows) == len(expected) == data.index["documents"]
        start = 0
        for row, one in zip(rows, expected, strict=True):
            known = by_text.get(one, {})
            files = {"plain": "plain.jsonl", "a row": "rows.parquet"}
            assert row["id"] == (str(known["id"]) if known else None)
            assert row["source"] == known.get("source", files.get(one[:5]))
            assert (row["start"], row["bytes"]) == (start, len(one))
            start += row["tokens"]
        assert start == data.index["tokens"]
        owners = [row["source"] for row in rows for _ in range(row["tokens"])]
        at = 0
        for shard in [*data.index["shards"], data.index["tail"]]:
            count = shard.get("tokens", shard["samples"] * 16)
            assert shard["sources"] == dict(collections.Counter(owners[at : at + count]))
            at += count
        assert data.index["sources"] == dict(collections.Counter(owners))
        inside = documents.inside(folder / split, 1, 16)
        assert [one["id"] for one in inside] == [
            row["id"] for row in rows if row["start"] < 32 and row["start"] + row["tokens"] > 16
        ]
    done = module("data_pipeline.inspect", folder)
    assert "tokens by source: " in done.stdout
    preparing.prepare(
        config(tmp_path / "keys", tmp_path / "rows.parquet", id_field="key", heldout_fraction=0.3, vocab_size=277)
    )
    rows = pyarrow.parquet.read_table(tmp_path / "keys/train/documents.parquet").to_pylist()
    assert all(row["id"].startswith("k") for row in rows)


@given(st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=30), st.integers(1, 50))
def test_pieces_of_a_file_hold_every_line_once(tmp_path_factory, lines, size):
    path = tmp_path_factory.mktemp("p") / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    whole = path.stat().st_size
    parts = [readers.Part(str(path), start, min(start + size, whole), size, "jsonl") for start in range(0, whole, size)]
    with path.open("rb") as file:
        found = [line for part in parts for _, line in readers._range(file, part)]
    assert b"".join(found) == path.read_bytes()
    assert [line.rstrip(b"\n") for line in found] == path.read_bytes().split(b"\n")[: len(found)]


def test_duplicates_and_filters_are_counted(text, tmp_path, small_parts):
    folder = tmp_path / "data"
    preparing.prepare(config(folder, text, deduplicate=True, min_characters=10, max_characters=200))
    written = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    fitting = [one for one in written if 10 <= len(one) <= 200]
    counts = json.loads((folder / "complete.json").read_text())["records"]
    assert counts["records"] == len(written)
    assert counts["short"] == sum(len(one) < 10 for one in written)
    assert counts["long"] == sum(len(one) > 200 for one in written)
    assert counts["duplicate"] == len(fitting) - len(set(fitting))
    assert sum(counts[name] for name in counts if name != "records") == counts["records"]
    train, heldout = texts(folder, "train"), texts(folder, "heldout")
    assert sorted(train + heldout) == sorted(set(fitting))
    assert train == list(dict.fromkeys(one for one in fitting if one not in set(heldout)))
    assert PackedDataset(folder / "train").index["documents"] == counts["train"] == len(train)


def test_what_is_held_out_is_not_trained_on(text, tmp_path):
    """A held-out file whose documents are in the training text as well."""
    lines = text.read_text(encoding="utf-8").splitlines()
    (tmp_path / "heldout.jsonl").write_text("\n".join(lines[:50]), encoding="utf-8")
    folder = tmp_path / "data"
    preparing.prepare(config(folder, text, heldout_text=[str(tmp_path / "heldout.jsonl")], deduplicate=True))
    assert not set(texts(folder, "train")) & set(texts(folder, "heldout"))


@pytest.mark.parametrize("workers", [1, 3])
def test_kill_at_random_moments(text, tmp_path, small_parts, workers):
    """kill -9 of the whole group, again and again: finished units are kept, and the result is that of a calm run."""
    preparing.prepare(config(tmp_path / "calm", text, deduplicate=True))
    killed = config(tmp_path / "killed", text, deduplicate=True, workers=workers)
    work = tmp_path / ".killed.partial/work"
    draw, done = random.Random(workers), []
    for _ in range(6):
        process = multiprocessing.get_context("fork").Process(target=_in_group, args=(killed,))
        process.start()
        time.sleep(draw.uniform(0.05, 0.6 if workers == 1 else 2.5))
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.join()
        done.append(len(list(work.glob("unit-*"))))
    preparing.prepare(killed)
    assert content(tmp_path / "killed") == content(tmp_path / "calm")
    assert done[:-1] <= sorted(done[:-1]) or (tmp_path / "killed").exists()


def _in_group(settings):
    os.setsid()
    preparing.prepare(settings)


def test_bad_records_are_listed_and_stop_the_run_only_when_many(tmp_path):
    path = tmp_path / "x.jsonl"
    good = [json.dumps({"text": f"a good document, number {n}, of some length"}) for n in range(300)]
    lines = [*good[:150], "{broken", *good[150:], json.dumps({"body": "no text"}), "", json.dumps({"text": "  "})]
    path.write_text("\n".join(lines))
    folder = tmp_path / "data"
    preparing.prepare(config(folder, path))
    counts = json.loads((folder / "complete.json").read_text())["records"]
    assert (counts["bad"], counts["empty"], counts["records"]) == (2, 1, 303)
    bad = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    assert [one["place"] for one in bad] == [f"{path} line 151", f"{path} line 302"]
    assert "is not a JSON object" in bad[0]["problem"]
    with pytest.raises(UserError, match="2 of 303 records .* data.max_bad_fraction .* line 151"):
        preparing.prepare(config(tmp_path / "strict", path, max_bad_fraction=0.001))
    assert not (tmp_path / "strict").exists()


BROKEN = [
    b'{"text": "unfinished', b"\x00\x00\x00", b"\xff\xfe{}", b"[]", b"null", b'{"text": null}', b'{"text": 1}', b"   ",
    b'{"text": "\\ud800"}', b"[" * 5000, b'{"text": "\x00 nul inside"}', b'{"text": "ok \\u0000 escaped nul"}', b"{}",
]  # fmt: skip


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from([b'{"text": "a good line"}', *BROKEN]) | st.binary(max_size=30), max_size=40), st.data()
)
def test_fuzzed_files_lose_nothing_silently(tmp_path_factory, lines, data):
    """Whatever is in a file, every record is counted, and nothing but a UserError comes out."""
    content = b"\n".join(line.replace(b"\n", b" ") for line in lines)
    name, pack = data.draw(
        st.sampled_from([("x.jsonl", bytes), ("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.compress)])
    )
    packed = pack(content)
    packed = packed[: data.draw(st.integers(0, len(packed)) | st.just(len(packed)))]
    path = tmp_path_factory.mktemp("f") / name
    path.write_bytes(packed)
    try:
        records = [record for part in readers.parts([str(path)]) for record in readers.read(part)]
    except UserError:
        return  # names the file: test_bad_files_are_named
    read = packed if name == "x.jsonl" else content
    if name != "x.jsonl" and packed != pack(content):
        assert not packed, "a truncated file was taken for a whole one"
        return
    assert len(records) == sum(bool(line.strip()) for line in read.split(b"\n"))
    assert all(record.problem or readers.encodable(record.text) for record in records)


def test_giant_lines_are_bad_records(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": word}) for word in ("a", "b" * 5000, "c", "d" * 986)]
    path.write_text("\n".join(lines))
    for size in (100, 10_000):
        monkeypatch.setattr(readers, "PART_BYTES", size)
        records = [record for part in readers.parts([str(path)]) for record in readers.read(part)]
        assert [record.text[:1] for record in records] == ["a", "", "c", "d"]
        assert records[1].problem == f"is a line of {len(lines[1]) + 1} bytes, more than 1000"


def test_tar_files_urls_and_row_groups(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (
            ("one.txt", b"a text"), ("two.jsonl", b'{"text": "b"}\n{"text": "c"}'), ("three.bin", b"\x00"),
            ("four.jsonl.gz", gzip.compress(b'{"text": "d"}')),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert list(readers.documents([str(tmp_path / "a.tar")])) == ["a text", "b", "c", "d"]
    assert list(readers.documents([f"file://{tmp_path}/*.tar"])) == ["a text", "b", "c", "d"]
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("x.parquet"))
    with pytest.raises(UserError, match="b.tar/x.parquet"):
        list(readers.documents([str(tmp_path / "b.tar")]))
    (tmp_path / "b.tar").unlink()
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1500])
    with pytest.raises(UserError, match="cut.tar cannot be read"):
        list(readers.documents([str(tmp_path / "cut.tar")]))
    for url in ("file:///nowhere/*.txt", "nosuch://x/y.txt"):
        with pytest.raises(UserError, match="no text at|opened"):
            list(readers.documents([url]))
    table = pyarrow.table({"text": [f"row {n}" if n % 7 else None for n in range(1000)]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=100)
    parts = list(readers.parts([str(tmp_path / "x.parquet")]))
    assert sum(part.stop - part.start for part in parts) == 10
    records = [record for part in parts for record in readers.read(part)]
    assert [record.text for record in records] == [f"row {n}" if n % 7 else "" for n in range(1000)]
    halves = [readers.Part(str(tmp_path / "x.parquet"), a, b, 1, "parquet") for a, b in ((0, 4), (4, 10))]
    assert [record for part in halves for record in readers.read(part)] == records


@given(st.integers(0, 500), st.integers(1, 12), st.integers(1, 7))
def test_a_stream_is_cut_without_loss(tokens, length, per_shard):
    places = shards.cut(tokens, length, per_shard)
    covered = [token for place in places for token in range(place.start, place.stop)]
    assert covered == list(range(tokens))
    assert all((place.stop - place.start) % length == 0 for place in places if place.name != "tail.tar")
    assert all(place.stop - place.start <= length * per_shard for place in places)


def module(*words):
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_tokenizer_of_its_own_and_what_is_in_the_data(text, tmp_path, kind):
    """train_tokenizer makes what a preparation uses; inspect finds every document and every damage."""
    words = ("data_pipeline.train_tokenizer", "--text", text, "--vocab", 290, "--kind", kind, "--out", tmp_path / "t")
    done = module(*words)
    assert done.returncode == 0, done.stderr
    assert f"290 pieces ({kind})" in done.stdout
    again = module(*words)
    assert (again.returncode, again.stdout) == (2, "")
    assert "tokenizer.model exists" in again.stderr
    tokenizer = tokenizers.load(tmp_path / "t")
    assert tokenizer.decode(tokenizer.encode("any text \u4f60 \U0001f600\n")) == "any text \u4f60 \U0001f600\n"
    folder = tmp_path / "data"
    preparing.prepare(config(folder, text, tokenizer=str(tmp_path / "t")))
    done = module("data_pipeline.inspect", folder, "--picture", tmp_path / "lengths.png")
    assert done.returncode == 0, done.stderr
    assert f"{folder}: records 780, train" in done.stdout
    assert done.stdout.count("every shard has its size and SHA-256") == 2
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    for split in ("train", "heldout"):
        lengths = inspect.document_lengths(PackedDataset(folder / split), tokenizer.eos_id)
        assert lengths.tolist() == [len(tokenizer.encode(one)) + 1 for one in texts(folder, split)]
    shard = folder / "train/shard-000003.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    done = module("data_pipeline.inspect", folder)
    assert done.returncode == 2
    assert "shard-000003.tar is damaged" in done.stderr
    assert "Traceback" not in done.stderr
    assert "complete.json" in module("data_pipeline.inspect", tmp_path).stderr


def _config(tmp_path, **data):
    return RunConfig.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"length": 16},
            "orders": {"rho": 8},
            "data": {"vocab_size": 300, **data},
        }
    )


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {n}, {n * n} words " * 4}) + "\n" for n in range(90)))
    return str(path)


def test_prepare_is_reproducible_and_done_once(tmp_path, prose):
    first, second = (
        _config(tmp_path, text=[prose], directory=str(tmp_path / name), heldout_fraction=0.2) for name in ("one", "two")
    )
    index = prepare(first)
    prepare(second)
    for split in ("train", "heldout"):
        assert PackedDataset(tmp_path / "one" / split).index == PackedDataset(tmp_path / "two" / split).index
    shard = tmp_path / "one/train/shard-000000.tar"
    before = shard.stat().st_mtime_ns
    assert prepare(first) == index
    assert shard.stat().st_mtime_ns == before
    other = _config(tmp_path, text=[prose], directory=str(tmp_path / "one"), heldout_fraction=0.3)
    with pytest.raises(UserError, match="heldout_fraction"):
        prepare(other)


def test_splits_do_not_overlap(tmp_path, prose):
    config = _config(tmp_path, text=[prose], heldout_fraction=0.2)
    index = prepare(config)
    heldout = PackedDataset(config.data_directory / "heldout").index
    assert index["documents"] + heldout["documents"] == 90
    assert heldout["documents"] > 5
    total = sum(len(text.encode()) for text in readers.documents([prose]))
    assert index["bytes"] + heldout["bytes"] == total


def test_interrupted_preparation_starts_again(tmp_path, prose):
    """What was being written lies beside the final place and counts for nothing."""
    config = _config(tmp_path, text=[prose], heldout_fraction=0.2)
    partial = config.data_directory.with_name(".data.partial")
    (partial / "tokenizer").mkdir(parents=True)
    (partial / "tokenizer/tokenizer.json").write_text("{}")
    index = prepare(config)
    assert not partial.exists()
    assert [p.name for p in (config.data_directory / "tokenizer").iterdir()] == ["tokenizer.model"]
    assert prepare(config) == index


def test_a_failed_preparation_leaves_nothing_behind(tmp_path, prose):
    """Its tokenizer, above all, must not be taken for that of the next try."""
    with pytest.raises(UserError, match="held-out text .* 0 tokens"):
        prepare(_config(tmp_path, text=[prose], heldout_fraction=0.0))
    index = prepare(_config(tmp_path, text=[prose], heldout_fraction=0.2))
    tokenizer = tokenizers.load(tmp_path / "run/data/tokenizer")
    assert tokenizers.digest(tokenizer) == index["tokenizer_sha256"]


def test_damage_is_found_when_a_run_goes_on(tmp_path, prose):
    config = _config(tmp_path, text=[prose], heldout_fraction=0.2)
    prepare(config)
    shard = config.data_directory / "train/shard-000000.tar"
    good = shard.read_bytes()
    shard.write_bytes(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    fields = {"text": [prose], "heldout_fraction": 0.2}
    with pytest.raises(UserError, match="shard-000000.tar .* data.damaged_shards=leave_out"):
        samples.check(config)
    samples.check(_config(tmp_path, **fields, verify=False))
    shard.write_bytes(good[:1000])
    with pytest.raises(UserError, match="shard-000000.tar .* 1000 bytes"):
        samples.check(_config(tmp_path, **fields, verify=False))
    with pytest.raises(UserError, match="every shard"):
        samples.check(_config(tmp_path, **fields, damaged_shards="leave_out"))
    shard.write_bytes(good)
    samples.check(config)
    next((config.data_directory / "heldout").glob("*.tar")).unlink()
    with pytest.raises(UserError, match="heldout/.* is missing"):
        samples.check(_config(tmp_path, **fields, damaged_shards="leave_out"))


def test_text_that_has_changed_is_noticed(tmp_path, prose):
    config = _config(tmp_path, text=[prose], heldout_fraction=0.2)
    index = prepare(config)
    with open(prose, "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"prose.jsonl has changed"):
        prepare(config)
    Path(prose).unlink()  # the shards are enough once they are there
    assert prepare(config) == index


def test_mixtures_must_fit_together(tmp_path, prose):
    own = _config(tmp_path, text=[prose], directory=str(tmp_path / "one"), heldout_fraction=0.2)
    prepare(own)
    tokenizer = str(tmp_path / "one/tokenizer")
    prepare(_config(tmp_path, text=[prose], directory=str(tmp_path / "two"), heldout_fraction=0.4, tokenizer=tokenizer))
    prepare(_config(tmp_path, text=[prose], directory=str(tmp_path / "odd"), heldout_fraction=0.2, vocab_size=290))
    fields = own.model_dump()
    fields["data"]["mixture"] = [{"directory": str(tmp_path / "two"), "weight": 0.5}]
    mixed = RunConfig.model_validate(fields)
    samples.check(mixed)
    datasets = open_mixture(mixed)
    sources, _ = Mixture(datasets, [1.0, 0.5], 0).assign(np.arange(300))
    assert (sources == 1).sum() == pytest.approx(100, abs=2)
    for other, line in (("odd", "another tokenizer"), ("absent", "not a complete data set")):
        fields["data"]["mixture"] = [{"directory": str(tmp_path / other)}]
        with pytest.raises(UserError, match=line):
            samples.check(RunConfig.model_validate(fields))


def test_a_folder_of_other_things_is_not_overwritten(tmp_path, prose):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="choose another data.directory"):
        prepare(_config(tmp_path, text=[prose], directory=str(tmp_path / "mine"), heldout_fraction=0.2))
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"


def test_held_out_text_is_not_trained_on(tmp_path, prose):
    with pytest.raises(UserError, match="share files"):
        prepare(_config(tmp_path, text=[prose], heldout_text=[prose]))


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"text": ["/nowhere/*.txt"]}, "/nowhere"),
        ({"text": ["EMPTY"]}, "there is no text to train"),
        ({"text": ["PROSE"], "heldout_fraction": 0.0}, "held-out text .* 0 tokens"),
        ({"text": ["PROSE"], "tokenizer": "/nowhere"}, "/nowhere"),
    ],
)
def test_text_that_cannot_be_used(tmp_path, prose, data, line):
    (tmp_path / "empty.txt").write_text("")
    places = {"EMPTY": str(tmp_path / "empty.txt"), "PROSE": prose}
    data = {**data, "text": [places.get(name, name) for name in data["text"]]}
    with pytest.raises(UserError, match=line):
        prepare(_config(tmp_path, **data))
    assert not (tmp_path / "run/data/complete.json").exists()
