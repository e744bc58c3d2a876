"""Tokenizers: text comes back as it was, and encoding by segments changes no token."""

import random

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st

from armd_scale.data import segments
from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError
from tests.conftest import shared_data


@pytest.fixture(scope="module")
def piece(tmp_path_factory):
    texts = [" ".join(f"word{i % 37} and line {i}\n    indented {i * 7}" for i in range(400))] * 3
    return tokenizers.train(texts, tmp_path_factory.mktemp("t") / "tokenizer.model", 400)


ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


@given(ANY_TEXT)
def test_sentencepiece_gives_the_text_back(piece, text):
    tokens = piece.encode(text)
    assert piece.decode([piece.bos_id, *tokens, piece.eos_id]) == text
    assert all(0 <= t < piece.vocab_size and t not in (piece.bos_id, piece.eos_id) for t in tokens)
    assert [each.tolist() for each in piece.encode_batch([text])] == [tokens]


def test_a_vocabulary_that_the_text_cannot_fill(tmp_path):
    with pytest.raises(UserError, match="5000 pieces"):
        tokenizers.train(["too little text"], tmp_path / "x.model", 5000)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        tokenizers.load(tmp_path)


def test_a_broken_tokenizer_is_named_and_replaced(tmp_path, piece):
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(UserError, match="sentencepiece model"):
        tokenizers.load(tmp_path)
    tokenizers.copy(piece, tmp_path)
    assert tokenizers.digest(tokenizers.load(tmp_path)) == tokenizers.digest(piece)


@pytest.fixture(scope="module")
def gpt2():
    return tokenizers.load(shared_data("tokenizers/gpt2"))


def test_gpt2_tokenizer(gpt2):
    assert gpt2.vocab_size == 50257
    assert gpt2.bos_id == gpt2.eos_id == 50256
    assert gpt2.encode("Hello world") == [15496, 995]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("First document.\n", id="ascii"),
        pytest.param("Umlauten: \u00e4\u00f6\u00fc \u2014 \u4f60\u597d \U0001f600", id="other-scripts"),
        pytest.param("  indented\n\tand tabs\n\n", id="spaces"),
    ],
)
def test_gpt2_gives_the_text_back(gpt2, text):
    assert gpt2.decode([*gpt2.encode(text), gpt2.eos_id]) == text


TRAINED_ON = ["it's", "we'll", "  a", "b\n\n", "12", "3,000", "x--y", "\u00e9t\u00e9", "\u201cso\u201d", "\t(d)"]


def train_byte_level(texts, **settings):
    """A byte-level BPE that splits text as GPT-2 does."""
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False, **settings
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    draw, words = random.Random(0), [*TRAINED_ON, "c.\n", "'tis"]
    bpe = train_byte_level([" ".join(draw.choices(words, k=50)) for _ in range(200)], vocab_size=700)
    bpe.save(str(folder / "tokenizer.json"))
    return tokenizers.load(folder), bpe


# What splits depend on: every kind of space, apostrophes, and characters that end in the bytes of spaces.
_SIGNS = " \n\t\r'\"-.,(s1a\x00\x0b\x1c\x85\xa0\u1680\u180e\u2003\u2028\u202f\u205f\u3000\u201d\u2019\u0120\u00e9\u2581"
_WORDS = ["'s", "'ll", "'re", "word", "  ", "\n\n", " 's", "e\u0301", "\U0001f600", "fifteen-letters", "x" * 70]
TRICKY = st.sampled_from([*_SIGNS, *_WORDS])
TEXTS = st.lists(st.lists(TRICKY, max_size=30).map("".join) | ANY_TEXT, max_size=6)


@given(TEXTS, st.sampled_from([1, 7, 64, 1 << 19]))
def test_byte_level_segments_are_exact(byte_level, texts, window):
    tokenizer, bpe = byte_level
    assert tokenizer._segments is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "_WINDOW", window)
        found = tokenizer.encode_batch(texts)
    assert [each.tolist() for each in found] == [bpe.encode(text, add_special_tokens=False).ids for text in texts]
    assert [tokenizer.decode(each.tolist()) for each in found] == texts


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_segments_are_exact(kind, tmp_path):
    draw, words = random.Random(0), [*TRAINED_ON, "c.", "the"]
    lines = [" ".join(draw.choices(words, k=20)) + "\n" for _ in range(300)]
    tokenizer = tokenizers.train(lines, tmp_path / "tokenizer.model", 295, kind=kind)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer._segments is not None

    @given(TEXTS, st.sampled_from([1, 7, 64, 1 << 19]))
    def check(texts, window):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "_WINDOW", window)
            found = tokenizer.encode_batch(texts)
        for text, tokens in zip(texts, found, strict=True):
            assert tokenizer.decode(tokens.tolist()) == text
            if "\u2581" not in text:  # which the library takes for a space
                assert tokens.tolist() == plain.encode(text)

    check()


def test_segments_are_forgotten_in_time(byte_level, monkeypatch):
    """Many more segments than are kept: the tokens stay the same."""
    tokenizer, bpe = byte_level
    monkeypatch.setattr(segments, "_MOST_SEGMENTS", 100)
    monkeypatch.setattr(segments, "_WINDOW", 1000)
    draw = random.Random(1)
    text = " ".join("".join(draw.choices("abcxy'-,1", k=draw.randrange(1, 30))) for _ in range(5000))
    for _ in range(2):
        assert tokenizer.encode(text) == bpe.encode(text).ids
    assert tokenizer._segments._table.used < 1000


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 2**64 - 1)), unique=True, max_size=300))
def test_the_table_is_a_dictionary(keys):
    table = segments._Table(size=2)
    low, high = (np.array([key[part] for key in keys], dtype=np.uint64) for part in (0, 1))
    for first in range(0, len(keys), 37):
        part = slice(first, first + 37)
        place = np.arange(len(keys))[part]
        table.insert(low[part], high[part], place, place + 1)
    slots = table.find(low, high)
    assert (slots >= 0).all()
    assert table.begin[slots].tolist() == list(range(len(keys)))
    assert table.count[slots].tolist() == list(range(1, len(keys) + 1))
    others = [(a ^ 1, b) for a, b in keys if (a ^ 1, b) not in set(keys)]
    assert (table.find(*(np.array([k[i] for k in others], dtype=np.uint64) for i in (0, 1))) == -1).all()


def test_tokenizers_that_change_text_are_left_to_their_library(tmp_path, byte_level):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text to train on, and more"] * 50), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=18, minloglevel=2,
    )  # fmt: skip
    usual = tokenizers.load(tmp_path)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert usual._segments is None
    assert usual.encode(" \ufb01ne  text") == plain.encode(" \ufb01ne  text")
    assert not tokenizers.gives_back(usual)
    _, bpe = byte_level
    bpe = library.Tokenizer.from_str(bpe.to_str())
    bpe.normalizer = library.normalizers.Lowercase()
    (tmp_path / "lower").mkdir()
    bpe.save(str(tmp_path / "lower/tokenizer.json"))
    lower = tokenizers.load(tmp_path / "lower")
    assert lower._segments is None
    assert lower.encode("Some TEXT") == bpe.encode("Some TEXT").ids
    assert not tokenizers.gives_back(lower)
    assert tokenizers.gives_back(byte_level[0])


def test_segments_on_real_text(gpt2):
    text = shared_data("zeroshot/wikitext2_raw_test.txt").read_text(encoding="utf-8")
    bpe = library.Tokenizer.from_file(str(shared_data("tokenizers/gpt2") / "tokenizer.json"))
    assert gpt2.encode(text) == bpe.encode(text, add_special_tokens=False).ids


def test_a_hugging_face_file_that_cuts_and_fills(tmp_path):
    """Settings that a tokenizer.json carries from its last user do not reach the data."""
    bpe = train_byte_level(["some text to train on"] * 9)
    bpe.enable_truncation(4)
    bpe.enable_padding(length=8)
    bpe.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load(tmp_path)
    long = "a much longer text than four tokens, with <|endoftext|> written out"
    assert loaded.decode(loaded.encode(long)) == long
    assert loaded.eos_id not in loaded.encode(long)
    assert [len(t) for t in loaded.encode_batch(["x", long])] == [1, len(loaded.encode(long))]
    with pytest.raises(UserError, match="entries but the model"):
        tokenizers.load(tmp_path, loaded.vocab_size - 1)
