"""Tokenizers with a common interface: text <-> token ids, BOS and EOS, and a hash.

- sentencepiece: a ``.model`` file (``train`` uses byte fallback, so that any text can be encoded);
- Hugging Face: a ``tokenizer.json``, such as GPT-2's.

BOS and EOS are the tokens that a field, ``tokenizer_config.json`` or ``special_tokens_map.json`` names. No text is
encoded with either of them, whatever it spells.

If the byte pairs that no token spans are known, text is encoded by segments (``segments``), which is many times faster.
Where two ways to split a word have exactly the same score, the segment and the library can choose different ways:
evaluations encode by the library alone (``load(..., segments=False)``).
"""

import hashlib
import itertools
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from armd_scale.data.segments import SegmentEncoder, bytelevel_cuts, sentencepiece_cuts
from armd_scale.errors import UserError
from armd_scale.files import write_atomically

CHAT_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
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

    def encode_with_special(self, text: str) -> list[int]:
        """Token ids of a text in which the strings of special tokens, BOS and EOS too, are these tokens."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of token ids, without BOS and EOS."""
        ...

    def token(self, index: int) -> str:
        """The string of a token in the vocabulary."""
        ...


class ControlTokens(NamedTuple):
    """Names of the tokens that begin and end a text, as far as files or fields name them."""

    bos: str | None = None
    eos: str | None = None


class _LibraryTokenizer(ABC):
    """A tokenizer of a library, whose BOS and EOS never come from text."""

    vocab_size: int
    bos_id: int
    eos_id: int
    path: Path
    by_segments: bool
    """Whether texts are encoded by segments, where that is possible."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        segments = self._segments if self.by_segments else None
        batch = segments.encode_batch(texts) if segments else self._arrays(texts)
        controls = {self.bos_id, self.eos_id}
        for number, tokens in enumerate(batch):
            if any((tokens == control).any() for control in controls):
                batch[number] = self._encode_as_text(texts[number])
        return batch

    def decode(self, tokens: Iterable[int]) -> str:
        return self._decode([token for token in tokens if token not in (self.bos_id, self.eos_id)])

    def _arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, token_type(self.vocab_size)) for ids in self._encode(texts)]

    def _encode_as_text(self, text: str) -> np.ndarray:
        """Tokens of a text in which the library finds BOS or EOS: the string of a control token is cut in two."""
        controls = [self.bos_id, self.eos_id]
        strings = "|".join(re.escape(self.token(control)) for control in controls)
        edges = [0, *(match.start() + 1 for match in re.finditer(strings, text)), len(text)]
        for pieces in ([text[a:b] for a, b in itertools.pairwise(edges)], list(text)):
            tokens = np.concatenate(self._arrays(pieces))
            if not np.isin(tokens, controls).any():
                return tokens
        return tokens[~np.isin(tokens, controls)]

    def _control(self, names: Iterable[str | None]) -> int | None:
        """The id of the first of ``names`` that is not None. ``UserError`` if it is no token."""
        for name in names:
            if name is not None:
                token = self._id(name)
                if token is None:
                    raise UserError(f"{self.path} has no token '{name}': name a token of its vocabulary")
                return token
        return None

    @cached_property
    @abstractmethod
    def _segments(self) -> SegmentEncoder | None:
        """Encoder by segments; None if segments would change tokens."""

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts by the library."""

    @abstractmethod
    def encode_with_special(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, tokens: list[int]) -> str: ...

    @abstractmethod
    def _id(self, token: str) -> int | None:
        """The id of a token; None if the vocabulary does not have it."""

    @abstractmethod
    def token(self, index: int) -> str: ...


class SentencePieceTokenizer(_LibraryTokenizer):
    """A sentencepiece model; without names, BOS and EOS are the model's own."""

    def __init__(self, path: Path, names: ControlTokens, by_segments: bool = True) -> None:
        import sentencepiece

        self.path, self.by_segments = path, by_segments
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load(str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is not a sentencepiece model: {error}") from error
        self.vocab_size = self._processor.vocab_size()
        own = {"bos": self._processor.bos_id(), "eos": self._processor.eos_id()}
        eos = self._control([names.eos])
        if eos is None and own["eos"] < 0:
            raise UserError(f"{path} has no EOS piece: name the piece that ends a text in data.eos_token")
        self.eos_id = own["eos"] if eos is None else eos
        bos = self._control([names.bos])
        # A text begins behind the end of the text before it.
        self.bos_id = bos if bos is not None else own["bos"] if own["bos"] >= 0 else self.eos_id

    @cached_property
    def _model(self) -> Any:
        """The model's protocol buffer."""
        from sentencepiece import sentencepiece_model_pb2

        schema: Any = sentencepiece_model_pb2
        return schema.ModelProto.FromString(self._processor.serialized_model_proto())

    @cached_property
    def _keeps_text(self) -> bool:
        """Whether the model encodes every text without a change: no normalisation, and byte fallback."""
        text, kind = self._model.normalizer_spec, self._model.trainer_spec
        changed = text.precompiled_charsmap or text.add_dummy_prefix or text.remove_extra_whitespaces
        known = kind.model_type in (kind.UNIGRAM, kind.BPE) and not kind.treat_whitespace_as_suffix
        return bool(known and kind.byte_fallback and not changed)

    @cached_property
    def _segments(self) -> SegmentEncoder | None:
        """Encoder for models that keep the text; None for other models."""
        if not self._keeps_text:
            return None
        kinds = self._model.SentencePiece
        matching = (kinds.NORMAL, kinds.USER_DEFINED)
        pieces = (piece.piece.replace(_SPACE, " ") for piece in self._model.pieces if piece.type in matching)
        return SegmentEncoder(sentencepiece_cuts(pieces), self._encode, token_type(self.vocab_size))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        tokens = self._processor.encode(texts, num_threads=1)
        for number, text in enumerate(texts):
            if _SPACE in text and self._keeps_text:  # sentencepiece would encode the character as a space
                tokens[number] = list(self._spelt(text))
        return tokens

    def encode_with_special(self, text: str) -> list[int]:
        kinds = self._model.SentencePiece
        control = {piece.piece: index for index, piece in enumerate(self._model.pieces) if piece.type == kinds.CONTROL}
        control |= {self.token(index): index for index in (self.bos_id, self.eos_id)}
        parts = re.split("|".join(f"({re.escape(name)})" for name in control), text)
        ids = ([control[part]] if part in control else self.encode(part) for part in parts if part)
        return list(itertools.chain.from_iterable(ids))

    def _spelt(self, text: str) -> Iterator[int]:
        """Tokens of a text with U+2581, which is encoded as bytes."""
        for number, part in enumerate(text.split(_SPACE)):
            if number:
                yield from (self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode("utf-8"))
            yield from self._processor.encode(part)

    def _decode(self, tokens: list[int]) -> str:
        return self._processor.decode(tokens)

    def _id(self, token: str) -> int | None:
        index = self._processor.piece_to_id(token)
        return index if self._processor.id_to_piece(index) == token else None

    def token(self, index: int) -> str:
        return self._processor.id_to_piece(index)


class HuggingFaceTokenizer(_LibraryTokenizer):
    """A ``tokenizer.json``; without names, BOS and EOS are the first of ``_BOS``, ``_EOS`` among its special tokens."""

    _BOS = ("<|endoftext|>", "<s>", "<|begin_of_text|>", "[CLS]", "<bos>")
    _EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]", "<eos>")

    def __init__(self, path: Path, names: ControlTokens, by_segments: bool = True) -> None:
        import tokenizers

        self.path, self.by_segments = path, by_segments
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{path} is not a Hugging Face tokenizer: {error}") from error
        # The file may enable truncation or padding, or parse special tokens in text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids can have holes
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special} or set(vocabulary)
        eos = self._control([names.eos, *(name for name in self._EOS if name in special)])
        if eos is None:
            raise UserError(
                f"{path} does not say which token ends a text: name it in data.eos_token, "
                f"for example {_few(special - {*self._BOS})}"
            )
        self.eos_id = eos
        guessed = () if names.eos else (name for name in self._BOS if name in special)
        bos = self._control([names.bos, *guessed])
        self.bos_id = eos if bos is None else bos  # a text begins behind the end of the text before it

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_special(self, text: str) -> list[int]:
        return self._parser.encode(text, add_special_tokens=False).ids

    @cached_property
    def _parser(self) -> Any:
        """A copy of the tokenizer that finds special tokens in text."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

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

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def _id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, index: int) -> str:
        return self._tokenizer.id_to_token(index) or ""


def _few(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:5])


def load(
    path: str | Path,
    vocab_size: int | None = None,
    bos: str | None = None,
    eos: str | None = None,
    segments: bool = True,
) -> Tokenizer:
    """Load a ``.model`` file, a ``tokenizer.json``, or a directory with one of them.

    ``vocab_size``: vocabulary size of the model; ``UserError`` if the tokenizer has more entries. ``bos``, ``eos``:
    names of the control tokens; None: as ``tokenizer_config.json`` or ``special_tokens_map.json`` beside the file name
    them.
    ``segments``: whether texts are encoded by segments; False: by the tokenizer's library alone.
    """
    file = _file(Path(path).expanduser())
    named = control_tokens(file.parent)
    names = ControlTokens(bos or named.bos, eos or named.eos)
    kind = SentencePieceTokenizer if file.suffix == ".model" else HuggingFaceTokenizer
    tokenizer: Tokenizer = kind(file, names, segments)
    added = _settings(file.with_name("added_tokens.json")) if file.suffix == ".model" else {}
    if beyond := [name for name, number in added.items() if number >= tokenizer.vocab_size]:
        raise UserError(
            f"{file.parent} adds tokens to {file.name}, such as {beyond[0]}: write tokenizer.json with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(DIRECTORY)"
        )
    if vocab_size is not None:
        check_size(tokenizer, vocab_size)
    return tokenizer


def check_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """``UserError`` if a tokenizer has more entries than its model."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} entries but the model {vocab_size}: use the model's tokenizer"
        )


def _file(path: Path) -> Path:
    """The file that defines a tokenizer; of two files in a directory, the one with its added tokens."""
    for file in (path / "tokenizer.json", path / "tokenizer.model", path):
        if file.is_file() and file.suffix in (".json", ".model"):
            return file
    raise UserError(
        f"there is no tokenizer at {path}: expected tokenizer.json or tokenizer.model, which transformers' "
        "AutoTokenizer.from_pretrained(...).save_pretrained(DIRECTORY) writes for other kinds"
    )


def control_tokens(folder: Path) -> ControlTokens:
    """BOS and EOS of a directory, by ``tokenizer_config.json``, else by ``special_tokens_map.json``."""
    settings = _settings(folder / "special_tokens_map.json") | {
        name: value for name, value in read_settings(folder).items() if value is not None
    }
    tokens = []
    for name in ControlTokens._fields:
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise UserError(f"{folder}: {name}_token of the tokenizer is {token!r}, not a text: fix {_CONFIG}")
        tokens.append(token)
    return ControlTokens(*tokens)


def read_settings(folder: Path) -> dict[str, Any]:
    """The fields of ``tokenizer_config.json`` in a directory; empty without the file."""
    return _settings(folder / _CONFIG)


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}; fix it or remove it") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a JSON object: fix it or remove it")
    return settings


def gives_back(tokenizer: Tokenizer) -> bool:
    """Whether decoding restores a text with capitals, spaces, line ends, ligatures and other scripts."""
    text = " It's\n\n  \tThe \ufb01rst, \u00e9 e\u0301 \u4f60\u597d \U0001f600 \u2581\u00a0\u2028\r\n "
    return tokenizer.decode(tokenizer.encode(text)) == text


def digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of the file that defines the tokenizer."""
    return hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def identity(tokenizer: Tokenizer) -> list[Any]:
    """[hash, BOS, EOS]: equal for tokenizers that write the same tokens."""
    return [digest(tokenizer), tokenizer.bos_id, tokenizer.eos_id]


def copy(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy a tokenizer to a directory, under the names that ``load`` expects, with its chat template.

    ``tokenizer_config.json`` of the copy names BOS and EOS.
    """
    name = "tokenizer.model" if tokenizer.path.suffix == ".model" else "tokenizer.json"
    if tokenizer.path.resolve() == (folder / name).resolve():
        return
    shutil.copyfile(tokenizer.path, folder / name)
    settings = read_settings(tokenizer.path.parent)
    settings |= {"bos_token": tokenizer.token(tokenizer.bos_id), "eos_token": tokenizer.token(tokenizer.eos_id)}
    write_atomically(folder / _CONFIG, json.dumps(settings, indent=1))
    template = tokenizer.path.with_name(CHAT_TEMPLATE)
    if template.is_file():
        shutil.copyfile(template, folder / CHAT_TEMPLATE)


def _advice(error: Exception) -> str:
    """What to do, by the reason that sentencepiece gives."""
    reason = " ".join(str(error).split()).rsplit("] ", 1)[-1] or "it has no usable line"
    if most := re.search(r"size too high .* <= (\d+)", reason):
        return f"it gives at most {most[1]}; give more text or lower data.vocab_size"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
        return f"its characters alone are {least[1]}; raise data.vocab_size"
    return f"{reason}; give more text or change data.vocab_size"


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
        raise UserError(
            f"a tokenizer of {vocab_size} pieces cannot be trained on this text: {_advice(error)}"
        ) from error
    partial.replace(path)
    return SentencePieceTokenizer(path, ControlTokens())
