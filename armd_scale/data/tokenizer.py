"""Tokenizers with a common interface: text <-> token ids, BOS and EOS, and a hash.

- sentencepiece: a ``.model`` file (``train`` uses byte fallback, so that any text can be encoded);
- Hugging Face: a directory with ``tokenizer.json``, such as GPT-2's.

If the byte pairs that no token spans are known, text is encoded by segments (``segments``), which is many times faster.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from armd_scale.data.segments import SegmentEncoder, bytelevel_cuts, sentencepiece_cuts
from armd_scale.errors import UserError

_SPACE = "\u2581"
"""Character that stands for a space in sentencepiece."""


def token_type(vocab_size: int) -> np.dtype:
    """The smallest dtype of tokens: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    vocab_size: int
    bos_id: int
    eos_id: int
    path: Path
    """The file that defines the tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of several texts, of type ``token_type``."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of token ids, without BOS and EOS."""
        ...

    def token(self, index: int) -> str:
        """The string of a token in the vocabulary."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load(str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is not a sentencepiece model: {error}") from error
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{path} has no BOS or EOS piece: train it with both")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._segments:
            return self._segments.encode_batch(texts)
        return [np.array(ids, token_type(self.vocab_size)) for ids in self._processor.encode(texts, num_threads=1)]

    @cached_property
    def _segments(self) -> SegmentEncoder | None:
        """Encoder for models without normalisation and with byte fallback; None for other models."""
        from sentencepiece import sentencepiece_model_pb2

        schema: Any = sentencepiece_model_pb2
        model = schema.ModelProto.FromString(self._processor.serialized_model_proto())
        text, kind = model.normalizer_spec, model.trainer_spec
        changed = text.precompiled_charsmap or text.add_dummy_prefix or text.remove_extra_whitespaces
        known = kind.model_type in (kind.UNIGRAM, kind.BPE) and not kind.treat_whitespace_as_suffix
        if changed or not known or not kind.byte_fallback:
            return None
        matching = (model.SentencePiece.NORMAL, model.SentencePiece.USER_DEFINED)
        pieces = (piece.piece.replace(_SPACE, " ") for piece in model.pieces if piece.type in matching)
        return SegmentEncoder(sentencepiece_cuts(pieces), self._encode_segments, token_type(self.vocab_size))

    def _encode_segments(self, segments: list[str]) -> list[list[int]]:
        tokens = self._processor.encode(segments, num_threads=1)
        for number, segment in enumerate(segments):
            if _SPACE in segment:  # sentencepiece would encode the character as a space
                tokens[number] = list(self._spelt(segment))
        return tokens

    def _spelt(self, segment: str) -> Iterator[int]:
        """Tokens of a text with U+2581, which is encoded as bytes."""
        for number, part in enumerate(segment.split(_SPACE)):
            if number:
                yield from (self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode("utf-8"))
            yield from self._processor.encode(part)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._processor.decode([t for t in tokens if t not in (self.bos_id, self.eos_id)])

    def token(self, index: int) -> str:
        return self._processor.id_to_piece(index)


class HuggingFaceTokenizer:
    """A ``tokenizer.json``; BOS and EOS are the first of ``_BOS`` and ``_EOS`` in its vocabulary."""

    _BOS = ("<|endoftext|>", "<s>", "[CLS]", "<bos>")
    _EOS = ("<|endoftext|>", "</s>", "[SEP]", "<eos>")

    def __init__(self, folder: Path) -> None:
        import tokenizers

        self.path = folder / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{self.path} is not a Hugging Face tokenizer: {error}") from error
        # The file may enable truncation or padding, or parse special tokens in text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.bos_id, self.eos_id = self._special(self._BOS), self._special(self._EOS)

    def _special(self, names: tuple[str, ...]) -> int:
        for name in names:
            token = self._tokenizer.token_to_id(name)
            if token is not None:
                return token
        raise UserError(f"{self.path} has none of the special tokens {', '.join(names)}")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._segments:
            return self._segments.encode_batch(texts)
        return [np.array(ids, token_type(self.vocab_size)) for ids in self._encode(texts)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _segments(self) -> SegmentEncoder | None:
        """Encoder for byte-level BPE with GPT-2's pre-tokenizer and no normalisation; None for other models."""
        file: dict[str, Any] = json.loads(self._tokenizer.to_str())
        model, split = file["model"], file["pre_tokenizer"] or {}
        plain = model["type"] == "BPE" and not any(
            model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        )
        as_gpt2 = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split["add_prefix_space"]
        if not (plain and as_gpt2) or file["normalizer"] or not all(token["special"] for token in file["added_tokens"]):
            return None
        return SegmentEncoder(bytelevel_cuts(), self._encode, token_type(self.vocab_size))

    def decode(self, tokens: Iterable[int]) -> str:
        special = {self.bos_id, self.eos_id}
        return self._tokenizer.decode([t for t in tokens if t not in special], skip_special_tokens=False)

    def token(self, index: int) -> str:
        return self._tokenizer.id_to_token(index) or ""


def load(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Load a ``.model`` file, or a directory with ``tokenizer.model`` or ``tokenizer.json``.

    ``vocab_size``: vocabulary size of the model; ``UserError`` if the tokenizer has another.
    """
    tokenizer = _load(Path(path))
    if vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} entries but the model {vocab_size}: use the model's tokenizer"
        )
    return tokenizer


def _load(path: Path) -> Tokenizer:
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    if (path / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path)
    raise UserError(f"there is no tokenizer at {path}: expected tokenizer.model or tokenizer.json")


def gives_back(tokenizer: Tokenizer) -> bool:
    """Whether decoding restores a text with capitals, spaces, line ends, ligatures and other scripts."""
    text = " It's\n\n  \tThe \ufb01rst, \u00e9 e\u0301 \u4f60\u597d \U0001f600 \u2581\u00a0\u2028\r\n "
    return tokenizer.decode(tokenizer.encode(text)) == text


def digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of the file that defines the tokenizer."""
    return hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def copy(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the defining file to a directory, under the name that ``load`` expects."""
    name = "tokenizer.model" if tokenizer.path.suffix == ".model" else "tokenizer.json"
    if tokenizer.path.resolve() != (folder / name).resolve():
        shutil.copyfile(tokenizer.path, folder / name)


def train(texts: Iterable[str], path: Path, vocab_size: int, seed: int = 0, kind: str = "unigram") -> Tokenizer:
    """Train a sentencepiece model (``unigram`` or ``bpe``) on texts and write it to ``path``.

    Without normalisation, with byte fallback and with the line feed as a piece, so that decoding restores the text.
    """
    import sentencepiece

    sentencepiece.set_random_generator_seed(seed)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=file,
                vocab_size=vocab_size,
                model_type=kind,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                user_defined_symbols=["\n"],
                character_coverage=0.9999,
                max_sentence_length=1 << 20,
                bos_id=1,
                eos_id=2,
                unk_id=0,
                num_threads=1,
                minloglevel=2,
            )
    except (RuntimeError, OSError) as error:
        partial.unlink(missing_ok=True)
        reason = str(error).replace("\n", " ").rsplit("] ", 1)[-1]
        raise UserError(
            f"a tokenizer of {vocab_size} pieces cannot be trained on this text ({reason}): "
            "give more text or lower data.vocab_size"
        ) from error
    partial.replace(path)
    return SentencePieceTokenizer(path)
