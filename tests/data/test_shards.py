"""Packed samples in shards, and damaged shards."""

import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from armd_scale.data import shards
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.shards import PackedDataset
from armd_scale.errors import UserError

FLAGS = (shards.DOCUMENTS, shards.LOSS)


@given(st.integers(1, 30), st.integers(1, 300), st.sampled_from([np.uint16, np.uint32]), st.integers(0, 2))
def test_a_shard_is_what_the_writer_of_webdataset_makes(tmp_path_factory, count, length, dtype, flagged):
    folder = tmp_path_factory.mktemp("s")
    tokens = np.random.default_rng(0).integers(0, 60000, count * length).astype(dtype)
    flags = {name: np.random.default_rng(n).random(len(tokens)) < 0.5 for n, name in enumerate(FLAGS[:flagged])}
    shards.write_shard(folder, shards.Place("shard.tar", 0, len(tokens)), tokens, length, flags)
    with webdataset.TarWriter(str(folder / "whole.tar"), mtime=0) as tar:
        for number, sample in enumerate(tokens.reshape(count, length)):
            packed = {f"{name}.npy": np.packbits(flags[name].reshape(count, length)[number]) for name in flags}
            tar.write({"__key__": f"{number:08d}", "npy": sample, **packed})
    assert (folder / "shard.tar").read_bytes() == (folder / "whole.tar").read_bytes()


def _write(folder, tokens, length, per_shard, vocab=100, flags=None):
    """All shards of a stream of tokens, and their index."""
    flags = flags or {}
    tokens = tokens.astype(tokenizers.token_type(vocab))
    places = shards.cut(len(tokens), length, per_shard)
    assert [place.start for place in places[1:]] == [place.stop for place in places[:-1]]
    parts = [(place, slice(place.start, place.stop)) for place in places]
    written = [
        shards.write_shard(folder, place, tokens[part], length, {name: values[part] for name, values in flags.items()})
        for place, part in parts
    ]
    facts = {"tokens": len(tokens), "vocab_size": vocab, "bytes": 1, "flags": list(flags)}
    shards.write_index(folder, written, length, facts)


@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 7), st.sampled_from([300, 70_000]), st.randoms())
def test_shards_hold_the_samples(tmp_path_factory, count, length, per_shard, vocab, random):
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.array([random.randrange(vocab) for _ in range(count * length + random.randrange(length))])
    flags = {name: np.array([random.random() < 0.3 for _ in tokens], dtype=bool) for name in random.sample(FLAGS, 1)}
    _write(folder, tokens, length, per_shard, vocab, flags)
    data = PackedDataset(folder)
    shards.verify(folder)
    assert len(data) == count
    numbers = np.array([random.randrange(count) for _ in range(10)]) if count else np.array([], dtype=int)
    assert np.array_equal(data.read(numbers), tokens[: count * length].reshape(count, length)[numbers])
    assert np.array_equal(data.tail(), tokens[count * length :])
    for name in FLAGS:
        expected = flags.get(name, np.ones(len(tokens), dtype=bool))[: count * length].reshape(count, length)
        assert np.array_equal(data.flags(numbers, name), expected[numbers])
    if shards.DOCUMENTS in flags:
        cuts = {*np.flatnonzero(flags[shards.DOCUMENTS]).tolist(), *range(0, len(tokens), length)}
        pieces = np.split(tokens, sorted(cuts - {0}))
        found = data.sequences(range(count), True) + data.tail_sequences(True)
        assert [text.tolist() for text in found] == [piece.tolist() for piece in pieces if len(piece)]
    # any WebDataset reader sees the same
    names = [str(folder / shard["name"]) for shard in data.index["shards"]]
    if names:
        streamed = [s["npy"] for s in webdataset.WebDataset(names, shardshuffle=False).decode()]
        assert np.array_equal(np.stack(streamed), tokens[: count * length].reshape(count, length))


@pytest.fixture
def damaged(tmp_path):
    """A data set of 10 samples in shards of 4, to be damaged."""
    _write(tmp_path, np.arange(80), 8, 4)
    with tarfile.open(tmp_path / "shard-000001.tar") as tar:
        assert len(tar.getnames()) == 4
    return tmp_path


@pytest.mark.parametrize(
    ("name", "damage", "use", "line"),
    [
        pytest.param(
            "shard-000001.tar",
            lambda good: good[:-1],
            lambda folder: PackedDataset(folder).read([5]),
            "shard-000001.tar is damaged",
            id="short-shard",
        ),
        pytest.param(
            "shard-000001.tar",
            lambda good: good[:700] + b"x" + good[701:],
            shards.verify,
            "shard-000001.tar .* SHA-256",
            id="changed-byte",
        ),
        pytest.param(
            "shard-000001.tar",
            None,
            lambda folder: PackedDataset(folder).read([5]),
            "shard-000001.tar is missing",
            id="missing-shard",
        ),
        pytest.param("index.json", None, PackedDataset, "not a complete data set", id="missing-index"),
    ],
)
def test_damaged_shards_are_named(damaged, name, damage, use, line):
    path = damaged / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=line):
        use(damaged)
