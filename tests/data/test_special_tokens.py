"""Special tokens in a rendered chat are tokens; in any other text they are text."""

import pytest
import tokenizers as library

from armd_scale.data import tokenizer as tokenizers

WORDS = "the quick brown fox jumps over the lazy dog and runs away from it\n" * 30


def sentencepiece_kind(folder):
    return tokenizers.train([WORDS], folder / "tokenizer.model", 290), "<s>", "</s>"


def hugging_face_kind(folder):
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|im_start|>", "<|endoftext|>"]
    )
    bpe.train_from_iterator([WORDS], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    return tokenizers.load(folder), "<|im_start|>", "<|endoftext|>"


@pytest.mark.parametrize("kind", [sentencepiece_kind, hugging_face_kind])
def test_special_tokens(tmp_path, kind):
    tokenizer, first, last = kind(tmp_path)
    a, b = tokenizer._id(first), tokenizer._id(last)
    encode = tokenizer.encode
    text = f"{first}the fox{last}\n{last}"
    assert tokenizer.encode_with_special(text) == [a, *encode("the fox"), b, *encode("\n"), b]
    assert tokenizer.encode_with_special("the fox") == encode("the fox")
    assert not {a, b} & set(encode(text))
    assert tokenizer.decode(encode(text)) == text
