"""BOS and EOS are the tokens that a tokenizer's settings name, and no text spells them."""

import json
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st

from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError

TEXT = "price <s>1</s> now 0 <|endoftext|> <eos> </s></s>"


def byte_level(folder, special, ordinary=(), **files):
    """A byte-level BPE with added tokens; ``files``: JSON files beside it."""
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(["some text"], trainer)
    bpe.add_special_tokens(list(special))
    bpe.add_tokens([library.AddedToken(name, special=False, normalized=False) for name in ordinary])
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def names(tokenizer):
    return tokenizer.token(tokenizer.bos_id), tokenizer.token(tokenizer.eos_id)


KINDS = {
    "llama-3": (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|begin_of_text|>", "<|end_of_text|>"),
    "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|endoftext|>"),
    "qwen-chat": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "gemma": (["<pad>", "<eos>", "<bos>"], {"content": "<bos>"}, {"content": "<eos>"}),
    "smollm": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|endoftext|>"),
}


@pytest.mark.parametrize("source", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_settings_name_bos_and_eos(tmp_path, kind, source):
    special, bos, eos = KINDS[kind]
    folder = byte_level(tmp_path / "t", special, **{source: {"bos_token": bos, "eos_token": eos}})
    plain = [token["content"] if isinstance(token, dict) else token for token in (bos, eos)]
    loaded = tokenizers.load(folder)
    assert names(loaded) == (plain[0] or plain[1], plain[1]), "BOS is EOS where a tokenizer has none"
    assert tokenizers.identity(tokenizers.load(folder / "tokenizer.json")) == tokenizers.identity(loaded)


def test_ordinary_tokens_are_no_control_tokens(tmp_path):
    special, ordinary = ["<pad>", "<eos>", "<bos>"], ["<s>", "</s>", "<strong>"]
    assert names(tokenizers.load(byte_level(tmp_path / "guessed", special, ordinary))) == ("<bos>", "<eos>")
    settings = {"bos_token": "<bos>", "eos_token": "<eos>"}
    loaded = tokenizers.load(byte_level(tmp_path / "named", special, ordinary, tokenizer_config=settings))
    assert names(loaded) == ("<bos>", "<eos>")
    tokens = loaded.encode(TEXT)
    assert not {loaded.bos_id, loaded.eos_id} & set(tokens)
    assert loaded.decode(tokens) == TEXT


def test_arguments_name_them_first(tmp_path):
    folder = byte_level(tmp_path / "t", ["<a>", "<b>"], tokenizer_config={"eos_token": "<b>"})
    assert names(tokenizers.load(folder)) == ("<b>", "<b>")
    assert names(tokenizers.load(folder, bos="<a>")) == ("<a>", "<b>")
    assert names(tokenizers.load(folder, bos="<b>", eos="<a>")) == ("<b>", "<a>")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        pytest.param({}, "name it in data.eos_token", id="no-end"),
        pytest.param({"tokenizer_config": {"eos_token": "<gone>"}}, "no token '<gone>'", id="unknown-token"),
        pytest.param({"tokenizer_config": [1]}, "is not a JSON object", id="no-object"),
    ],
)
def test_a_tokenizer_without_an_end_is_refused(tmp_path, settings, line):
    with pytest.raises(UserError, match=line):
        tokenizers.load(byte_level(tmp_path / "t", ["<x>", "<y>"], **settings))


def test_a_copy_keeps_the_names_and_the_chat_template(tmp_path):
    settings = {"eos_token": "<b>", "chat_template": "{{ messages }}"}
    folder = byte_level(tmp_path / "t", ["<a>", "<b>"], tokenizer_config=settings)
    (folder / tokenizers.CHAT_TEMPLATE).write_text("{{ messages }}")
    loaded = tokenizers.load(folder, bos="<a>")
    (tmp_path / "copy").mkdir()
    tokenizers.copy(loaded, tmp_path / "copy")
    assert tokenizers.identity(tokenizers.load(tmp_path / "copy")) == tokenizers.identity(loaded)
    assert json.loads((tmp_path / "copy/tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    assert (tmp_path / "copy" / tokenizers.CHAT_TEMPLATE).is_file()


@pytest.mark.parametrize("special", [True, False], ids=["special", "ordinary"])
def test_text_never_spells_an_added_token(tmp_path, special):
    added = ["<|endoftext|>"]
    loaded = tokenizers.load(byte_level(tmp_path / "t", added if special else [], () if special else added))
    tokens = loaded.encode(TEXT)
    assert loaded.eos_id not in tokens
    assert loaded.decode(tokens) == TEXT
    assert loaded.encode_batch(["x", TEXT])[1].tolist() == tokens


def test_text_never_spells_a_piece_of_the_vocabulary(tmp_path):
    pieces = [("<unk>", 0.0), *((letter, -5.0) for letter in "<>/s|endoftx price10w"), ("</s>", -1.0), ("<s>", -1.0)]
    unigram = library.Tokenizer(library.models.Unigram(pieces, 0, False))
    unigram.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load(tmp_path)
    assert names(loaded) == ("<s>", "</s>")
    assert library.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("</s>").ids == [loaded.eos_id]
    tokens = loaded.encode(TEXT)
    assert not {loaded.bos_id, loaded.eos_id} & set(tokens)
    assert "".join(map(loaded.token, tokens)).count("</s>") == 3


def test_text_never_spells_a_token_after_normalisation(tmp_path):
    """Full-width characters become an end of text when they are normalised, in no place that a search finds."""
    words = library.Tokenizer(library.models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2}, unk_token="[UNK]"))
    words.normalizer = library.normalizers.NFKC()
    words.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load(tmp_path)
    assert words.encode("a \uff1c/s\uff1e").ids == [2, 1]
    assert loaded.eos_id not in loaded.encode("a \uff1c/s\uff1e a")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Sentencepiece with pieces that the user defined, one of which ends a text."""
    folder = tmp_path_factory.mktemp("s")
    draw = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["".join(draw.choices("abc <>/s", k=30)) for _ in range(200)]),
        model_prefix=str(folder / "tokenizer"), vocab_size=60, user_defined_symbols=["<end>"], bos_id=-1, eos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder


@given(st.text(alphabet="abc <>/send", max_size=30))
def test_sentencepiece_with_a_named_end(pieces, text):
    loaded = tokenizers.load(pieces, eos="<end>")
    assert names(loaded) == ("<end>", "<end>")
    assert loaded.eos_id not in loaded.encode(f"{text}<end>{text}")


def test_sentencepiece_without_an_end_is_refused(pieces):
    with pytest.raises(UserError, match=r"data\.eos_token"):
        tokenizers.load(pieces)
    with pytest.raises(UserError, match="no token '<gone>'"):
        tokenizers.load(pieces, eos="<gone>")


@pytest.mark.parametrize(("largest", "dtype"), [(699, np.uint16), (70_599, np.uint32)])
def test_a_vocabulary_with_holes(tmp_path, largest, dtype):
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": largest}
    words = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load(tmp_path)
    assert loaded.vocab_size == largest + 1
    (tokens,) = loaded.encode_batch(["a b"])
    assert tokens.tolist() == [1, largest]
    assert tokens.dtype == dtype
    assert loaded.token(2) == ""
