"""Model directories with both kinds of tokenizer, as this project and as transformers load them."""

import os

import pytest

from armd_scale.data import tokenizer as tokenizers
from tests.conftest import MODERN, PAPER, model_folder

TEXT = "def f(self):\n    return 'the cache of naïve 你好 ▁ <s> words'\t" * 30


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    """A directory with a sentencepiece tokenizer."""
    place = tmp_path_factory.mktemp("pieces")
    tokenizer = tokenizers.train([TEXT], tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 284)
    return model_folder(place, PAPER, tokenizer)


@pytest.fixture(scope="session")
def bytelevel(tmp_path_factory):
    """A directory with a byte-level BPE in ``tokenizer.json``, and an untied head."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    source = tmp_path_factory.mktemp("tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([TEXT], trainer)
    bpe.save(str(source / "tokenizer.json"))
    return model_folder(tmp_path_factory.mktemp("bytelevel"), MODERN, tokenizers.load(source))


@pytest.fixture(scope="session", autouse=True)
def modules(tmp_path_factory):
    """Where transformers keeps the code of directories, also if it is imported already."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def auto(place):
    """Model and tokenizer of a directory, as transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(place), trust_remote_code=True)
    return AutoModelForCausalLM.from_pretrained(str(place), trust_remote_code=True).eval(), tokenizer


@pytest.fixture(scope="session", params=["pieces", "bytelevel"])
def place(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def hub(place):
    """Model and tokenizer of transformers for the directory."""
    return auto(place)


@pytest.fixture(scope="session")
def own_tokenizer(place):
    return tokenizers.load(place)
