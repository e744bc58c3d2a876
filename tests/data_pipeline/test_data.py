"""Text in, shards and samples out: readers, tokenizers, packing, shards, the stream."""

import gzip
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from armd_scale.config import RunConfig
from armd_scale.data import readers, shards
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.shards import PackedDataset
from armd_scale.data.stream import Lost, Mixture, SampleStream, open_mixture
from armd_scale.errors import UserError
from armd_scale.training import samples
from data_pipeline.prepare import prepare

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


@given(st.integers(1, 30), st.integers(1, 300), st.sampled_from([np.uint16, np.uint32]))
def test_a_shard_is_what_the_writer_of_webdataset_makes(tmp_path_factory, count, length, dtype):
    folder = tmp_path_factory.mktemp("s")
    tokens = np.random.default_rng(0).integers(0, 60000, count * length).astype(dtype)
    shards.write_shard(folder, shards.Place("shard.tar", 0, len(tokens)), tokens, length)
    with webdataset.TarWriter(str(folder / "whole.tar"), mtime=0) as tar:
        for number, sample in enumerate(tokens.reshape(count, length)):
            tar.write({"__key__": f"{number:08d}", "npy": sample})
    assert (folder / "shard.tar").read_bytes() == (folder / "whole.tar").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.jsonl", b'{"text": "ok"}\n{"text": \n', "line 2 is not a JSON object"),
        ("x.jsonl", b'{"body": "ok"}\n', "line 1 .* field 'text'"),
        ("x.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("x.jsonl", b'{"text": 3}\n', "field 'text' is not text"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
        ("x.jsonl", b"[" * 100_000 + b"\n", "line 1 is not a JSON object"),
        ("x.txt.gz", gzip.compress(bytes(range(256)) * 40, mtime=0)[:60] + b"\x00" * 40, "cannot be read"),
        ("x.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("x.txt.gz", b"not gzip", "cannot be read"),
        ("x.txt.gz", gzip.compress(b"a" * 1000, mtime=0)[:-9], "cannot be read"),
        ("x.jsonl.zst", b"not zstd", "cannot be read"),
        ("x.parquet", b"PAR1", "cannot be read"),
        ("x.doc", b"\xd0\xcf\x11\xe0", "is not UTF-8"),
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


def test_missing_and_empty(tmp_path):
    with pytest.raises(UserError, match="no text at"):
        list(readers.documents([str(tmp_path / "absent.txt")]))
    with pytest.raises(UserError, match="no text at"):
        list(readers.documents([str(tmp_path)]))
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


def _write(folder, tokens, length, per_shard, vocab=100):
    """All shards of a stream of tokens, and their index."""
    tokens = tokens.astype(tokenizers.token_type(vocab))
    places = shards.cut(len(tokens), length, per_shard)
    assert [place.start for place in places[1:]] == [place.stop for place in places[:-1]]
    written = [shards.write_shard(folder, place, tokens[place.start : place.stop], length) for place in places]
    shards.write_index(folder, written, length, {"tokens": len(tokens), "vocab_size": vocab, "bytes": 1})


@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 7), st.sampled_from([300, 70_000]), st.randoms())
def test_shards_hold_the_samples(tmp_path_factory, count, length, per_shard, vocab, random):
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.array([random.randrange(vocab) for _ in range(count * length + random.randrange(length))])
    _write(folder, tokens, length, per_shard, vocab)
    data = PackedDataset(folder)
    shards.verify(folder)
    assert len(data) == count
    numbers = np.array([random.randrange(count) for _ in range(10)]) if count else np.array([], dtype=int)
    assert np.array_equal(data.read(numbers), tokens[: count * length].reshape(count, length)[numbers])
    assert np.array_equal(data.tail(), tokens[count * length :])
    # any WebDataset reader sees the same
    names = [str(folder / shard["name"]) for shard in data.index["shards"]]
    if names:
        streamed = [s["npy"] for s in webdataset.WebDataset(names, shardshuffle=False).decode()]
        assert np.array_equal(np.stack(streamed), tokens[: count * length].reshape(count, length))


def test_damaged_shards_are_named(tmp_path):
    _write(tmp_path, np.arange(80), 8, 4)
    shard = tmp_path / "shard-000001.tar"
    good = shard.read_bytes()
    with tarfile.open(shard) as tar:
        assert len(tar.getnames()) == 4
    shard.write_bytes(good[:-1])
    with pytest.raises(UserError, match="shard-000001.tar is damaged"):
        PackedDataset(tmp_path).read([5])
    shard.write_bytes(good[:700] + b"x" + good[701:])
    with pytest.raises(UserError, match="shard-000001.tar .* SHA-256"):
        shards.verify(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="shard-000001.tar is missing"):
        PackedDataset(tmp_path).read([5])
    (tmp_path / "index.json").unlink()
    with pytest.raises(UserError, match="not a complete data set"):
        PackedDataset(tmp_path)


@given(st.integers(1, 3000), st.integers(0, 2**31), st.data())
def test_the_stream_is_a_permutation_of_every_epoch(samples, seed, data):
    stream = SampleStream(samples, seed)
    whole = stream.take(0, 2 * samples)
    for epoch in range(2):
        assert np.array_equal(np.sort(whole[epoch * samples : (epoch + 1) * samples]), np.arange(samples))
    # stopping and going on anywhere gives the same sequence
    cut = data.draw(st.integers(0, 2 * samples))
    again = SampleStream(samples, seed)
    assert np.array_equal(np.concatenate([again.take(0, cut), again.take(cut, 2 * samples - cut)]), whole)


@given(st.integers(1, 300), st.lists(st.integers(0, 400), max_size=6, unique=True).map(sorted), st.integers(1, 200))
def test_ranges_can_be_left_out(samples, edges, count):
    """What is left is the whole sequence without the ranges, in its order."""
    skip = list(zip(edges[::2], edges[1::2], strict=False))
    whole = SampleStream(samples, 3).take(0, count + 400)
    kept = [sample for place, sample in enumerate(whole) if not any(a <= place < b for a, b in skip)]
    mixture = Mixture([_Numbers(samples)], [2.0], 3, skip)
    assert mixture.read(0, count)[:, 0].tolist() == kept[:count]
    assert mixture.read(count // 2, count)[: count - count // 2, 0].tolist() == kept[count // 2 : count]


@given(
    st.integers(2, 300), st.integers(0, 9), st.lists(st.tuples(st.integers(0, 500), st.integers(0, 299)), max_size=5),
    st.integers(1, 30),
)  # fmt: skip
def test_lost_samples_are_passed_over(samples, seed, losses, size):
    """From the moment of a loss on, what comes is what would have come, without the lost ones: checked one by one."""
    lost = [Lost(since, min(first, samples - 1), min(first + size, samples)) for since, first in losses]
    gone = {
        since: {n for each in lost if each.since <= since for n in range(each.first, each.last)} for since, _ in losses
    }
    if any(len(each) == samples for each in gone.values()):
        return
    whole = iter(SampleStream(samples, seed).take(0, 200 * samples + 2000).tolist())
    expected = []
    for number in range(700):
        without = set().union(*(each for since, each in gone.items() if since <= number))
        expected.append(next(sample for sample in whole if sample not in without))
    stream = SampleStream(samples, seed, lost)
    assert stream.take(0, 700).tolist() == expected
    assert stream.take(350, 10).tolist() == expected[350:360]


class _Numbers:
    """A data set whose samples are their own numbers."""

    length, bytes_per_token = 1, 1.0

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, numbers):
        return np.asarray(numbers)[:, None]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 10)), min_size=1, max_size=4),
    st.integers(0, 9),
    st.integers(0, 10**9),
    st.data(),
)
def test_mixtures_are_exact(sources, seed, start, data):
    """Any cut gives the same samples; inside a data set they follow its own order; shares hold in any window."""
    sizes, weights = zip(*sources, strict=True)
    mixture = Mixture([_Numbers(size) for size in sizes], weights, seed)
    chosen, inside = mixture.assign(np.arange(start, start + 200))
    cut = data.draw(st.integers(0, 200))
    halves = [mixture.assign(np.arange(*part)) for part in ((start, start + cut), (start + cut, start + 200))]
    assert np.array_equal(np.concatenate([half[0] for half in halves]), chosen)
    assert np.array_equal(np.concatenate([half[1] for half in halves]), inside)
    tokens = mixture.read(start, 200)[:, 0]
    for source, (size, weight) in enumerate(sources):
        here = inside[chosen == source]
        assert np.array_equal(here, np.arange(len(here)) + (here[0] if len(here) else 0)), "none repeated, none lost"
        expected = SampleStream(size, seed).take(int(here[0]), len(here)) if len(here) else []
        assert tokens[chosen == source].tolist() == list(expected)
        assert abs(len(here) - 200 * weight / sum(weights)) <= source + 1.01


def test_the_stream_shuffles():
    """Neighbours are spread, and epochs differ: no correlation beyond chance between place and sample."""
    stream = SampleStream(5000, 0)
    first, second = stream.take(0, 5000), stream.take(5000, 5000)
    assert (first == second).mean() < 0.01
    for order in (first, second):
        assert abs(np.corrcoef(np.arange(5000), order)[0, 1]) < 0.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


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
    with pytest.raises(UserError, match=r"\(text\)"):
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


def test_a_file_counts_once_and_its_name_is_no_pattern(tmp_path):
    odd = tmp_path / "a[1].txt"
    odd.write_text("only once\n")
    assert list(readers.documents([str(odd), str(odd), str(tmp_path / "*.txt")])) == ["only once\n"]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"text": ["/nowhere/*.txt"]}, "/nowhere"),
        ({"text": ["EMPTY"]}, "trained|0 tokens"),
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
