"""Tokenizers of model directories: added tokens, special tokens, BOS and EOS, chats; both kinds."""

import json
import pickle
import shutil

import pytest
import sentencepiece
from transformers import AddedToken, AutoTokenizer

from armd_scale.data import tokenizer as tokenizers
from armd_scale.inference import folder
from tests.conftest import PAPER, model_folder
from tests.inference.conftest import TEXT

CHAT = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
MESSAGES = [{"role": "def", "content": "the"}, {"role": "self", "content": "cache"}]


def auto(place, **settings):
    return AutoTokenizer.from_pretrained(str(place), trust_remote_code=True, **settings)


@pytest.fixture
def tokenizer(place):
    """A tokenizer that a test may change."""
    return auto(place)


@pytest.fixture
def pieces_tokenizer(pieces):
    return auto(pieces)


def test_added_tokens_have_ids_of_their_own(tokenizer, place):
    size = tokenizers.load(place).vocab_size
    assert len(tokenizer) == tokenizer.vocab_size == size
    assert tokenizer.add_tokens(["<new1>", "<new2>"]) == 2
    assert tokenizer.add_tokens(["<new3>", "<new1>"]) == 1
    assert tokenizer.add_special_tokens({"pad_token": "<pad>"}) == 1
    names = ["<new1>", "<new2>", "<new3>", "<pad>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(size, size + 4))
    assert tokenizer.convert_ids_to_tokens(range(size, size + 4)) == names
    assert tokenizer.pad_token_id == size + 3
    assert len(tokenizer) == len(tokenizer.get_vocab()) == size + 4
    assert tokenizer.decode([size + 1, size + 60, size + 2]) == "<new2><new3>"  # 60: a row of padded embeddings
    assert tokenizer.vocab_size == size


def test_added_tokens_are_found_in_text(tokenizer):
    inner = tokenizer("the", add_special_tokens=False).input_ids
    tokenizer.add_tokens(["<new>", "<new>er"])
    new, newer = tokenizer.convert_tokens_to_ids(["<new>", "<new>er"])
    ids = tokenizer("the<new>the<new>er<new>", add_special_tokens=False).input_ids
    assert ids == [*inner, new, *inner, newer, new]
    assert tokenizer.decode(ids) == "the<new>the<new>er<new>"


def test_added_special_tokens_of_pieces_are_found_and_skipped(pieces_tokenizer):
    pieces_tokenizer.add_special_tokens({"pad_token": "<pad>"})
    ids = pieces_tokenizer("the<pad><s>", add_special_tokens=False).input_ids
    assert pieces_tokenizer.decode(ids) == "the<pad><s>"
    assert pieces_tokenizer.decode(ids, skip_special_tokens=True) == "the<s>"
    assert ids.count(pieces_tokenizer.pad_token_id) == 1
    assert pieces_tokenizer.bos_token_id not in ids


def test_added_tokens_that_take_space_or_whole_words(pieces_tokenizer):
    pieces_tokenizer.add_tokens([AddedToken("<l>", lstrip=True, rstrip=True), AddedToken("cat", single_word=True)])
    assert pieces_tokenizer.decode(pieces_tokenizer("a <l> b").input_ids[1:]) == "a<l>b"
    tokens = pieces_tokenizer.tokenize("a cat concat")
    assert tokens.count("cat") == 1
    assert pieces_tokenizer.convert_tokens_to_string(tokens) == "a cat concat"


def test_added_tokens_and_settings_are_saved(place, tokenizer, tmp_path):
    tokenizer.add_tokens(["<new>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_bos_token, tokenizer.add_eos_token = False, True
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path)
    again = auto(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.add_bos_token, again.add_eos_token) == (False, True)
    assert again("the<new>the").input_ids == tokenizer("the<new>the").input_ids
    assert again.pad_token_id == tokenizer.pad_token_id
    assert again.chat_template == CHAT
    pickled = pickle.loads(pickle.dumps(tokenizer))
    assert pickled("the<new>").input_ids == tokenizer("the<new>").input_ids


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_bos_and_eos_around_a_text(place, bos, eos):
    tokenizer, own = auto(place, add_bos_token=bos, add_eos_token=eos), tokenizers.load(place)
    out = tokenizer("the cache", return_special_tokens_mask=True)
    inner = own.encode("the cache")
    assert out.input_ids == [own.bos_id] * bos + inner + [own.eos_id] * eos
    assert out.special_tokens_mask == [1] * bos + [0] * len(inner) + [1] * eos
    assert out.attention_mask == [1] * len(out.input_ids)
    assert tokenizer.num_special_tokens_to_add() == bos + eos
    again = tokenizer.get_special_tokens_mask(out.input_ids, already_has_special_tokens=True)
    assert again == out.special_tokens_mask


def test_special_tokens_are_shown_and_are_text_in_documents(tokenizer, place):
    own = tokenizers.load(place)
    ids = [own.bos_id, *own.encode("the"), own.eos_id, *own.encode(" cache")]
    bos, eos = own.token(own.bos_id), own.token(own.eos_id)
    assert tokenizer.decode(ids) == f"{bos}the{eos} cache"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cache"
    for text in (bos, eos, f"the {eos}{bos}"):
        assert tokenizer(text).input_ids == [own.bos_id, *own.encode(text)]
    assert tokenizer(bos, split_special_tokens=False, add_special_tokens=False).input_ids == [own.bos_id]


def test_chats_have_special_tokens(tokenizer, place):
    own = tokenizers.load(place)
    tokenizer.chat_template = CHAT
    ids = tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert ids == [own.bos_id, *own.encode("def: the"), own.eos_id, *own.encode("self: cache"), own.eos_id]
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert tokenizer.decode(ids) == text
    spelt = tokenizer.apply_chat_template(MESSAGES, tokenizer_kwargs={"split_special_tokens": True})["input_ids"]
    assert spelt == own.encode(text)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_chat_template_of_the_original_is_kept(place, file, tmp_path):
    source, out = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    out.mkdir()
    for name in ("tokenizer.model", "tokenizer.json"):
        if (place / name).exists():
            shutil.copy(place / name, source)
    (source / file).write_text(json.dumps({"chat_template": CHAT}) if file.endswith(".json") else CHAT)
    own = tokenizers.load(source)
    tokenizer = auto(model_folder(out, PAPER, own))
    assert all(folder.FILES.fullmatch(path.name) for path in out.iterdir())  # else no export replaces this one
    ids = tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert ids == [own.bos_id, *own.encode("def: the"), own.eos_id, *own.encode("self: cache"), own.eos_id]


def test_pieces_without_bos(tmp_path):
    """The text of a model without BOS begins behind the end of the text before it."""
    (tmp_path / "text").write_text("\n".join(TEXT.split()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=40,
        bos_id=-1,
        hard_vocab_limit=False,
    )
    out = tmp_path / "model"
    out.mkdir()
    own = tokenizers.load(tmp_path / "tokenizer.model")
    tokenizer = auto(model_folder(out, PAPER, own))
    assert tokenizer("the words").input_ids == [own.eos_id, *own.encode("the words")]
    bare = type(tokenizer)(str(out / "tokenizer.model"), add_bos_token=False)
    assert bare("the words").input_ids == own.encode("the words")
