"""The tokenizer of a model directory as a Hugging Face tokenizer: the tokens of training, BOS first.

- ``ARMDTokenizer``: for ``tokenizer.model``, needs sentencepiece;
- ``ARMDTokenizerFast``: for ``tokenizer.json``.

The names of special tokens are text in a document, and tokens in a chat, whose template writes them.
"""

import itertools
import os
import re
from typing import Any

from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

try:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
except ImportError:
    pass  # a directory with tokenizer.json does without

_SPACE = "\u2581"


class _Frame:
    """BOS before a text and EOS behind it, as set by ``add_bos_token`` and ``add_eos_token``; chats.

    The library does not save these two settings, so they are saved as ``begins_with_bos`` and ``ends_with_eos``.
    """

    add_bos_token: bool
    add_eos_token: bool

    @property
    def begins_with_bos(self) -> bool:
        return self.add_bos_token

    @property
    def ends_with_eos(self) -> bool:
        return self.add_eos_token

    def apply_chat_template(self, *arguments: Any, tokenizer_kwargs: dict[str, Any] | None = None, **more: Any) -> Any:
        settings = {"split_special_tokens": False, **(tokenizer_kwargs or {})}
        return super().apply_chat_template(*arguments, tokenizer_kwargs=settings, **more)  # type: ignore[misc]


def _frame(settings: dict[str, Any]) -> dict[str, bool]:
    """Take the settings of ``_Frame`` out of a tokenizer's settings; returns them as they are saved."""
    begins, ends = settings.pop("begins_with_bos", True), settings.pop("ends_with_eos", False)
    return {
        "begins_with_bos": settings.pop("add_bos_token", begins),
        "ends_with_eos": settings.pop("add_eos_token", ends),
    }


class ARMDTokenizer(_Frame, PreTrainedTokenizer):
    """Token ids of ``tokenizer.model``, and of the tokens added to it.

    Text is encoded between the places that no piece reaches over, as training did; a U+2581 in a text, which
    sentencepiece takes for a space, is spelt in bytes. Added tokens are found in any text, special tokens of the model
    with ``split_special_tokens=False``.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012  (the library's name and type)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **settings: Any) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        schema: Any = sentencepiece_model_pb2
        model = schema.ModelProto.FromString(self._processor.serialized_model_proto())
        kinds = (model.SentencePiece.NORMAL, model.SentencePiece.USER_DEFINED)
        pieces = [p.piece.replace(_SPACE, " ").encode("utf-8") for p in model.pieces if p.type in kinds]
        self._held = {piece[at : at + 2] for piece in pieces for at in range(len(piece) - 1)}
        text, kind = model.normalizer_spec, model.trainer_spec
        changed = text.precompiled_charsmap or text.add_dummy_prefix or text.remove_extra_whitespaces
        known = kind.model_type in (kind.UNIGRAM, kind.BPE) and not kind.treat_whitespace_as_suffix
        self._by_segments = bool(not changed and known and kind.byte_fallback)  # as armd_scale.data.tokenizer decides
        for name, index in (("bos_token", self._processor.bos_id()), ("eos_token", self._processor.eos_id())):
            if index >= 0:  # else the model has no such piece
                settings.setdefault(name, self._processor.id_to_piece(index))
        settings.setdefault("pad_token", settings.get("eos_token"))
        frame = _frame(settings)
        self.add_bos_token, self.add_eos_token = frame.values()
        super().__init__(**settings, **frame)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {self._processor.id_to_piece(index): index for index in range(self.vocab_size)} | self.get_added_vocab()

    def tokenize(self, text: str, **settings: Any) -> list[str]:
        as_text = settings.get("split_special_tokens", self.split_special_tokens)
        names = [name for name, at in self.get_added_vocab().items() if at >= self.vocab_size or not as_text]
        if not names:
            return self._tokenize(text)
        pattern = "|".join(map(self._pattern, sorted(names, key=len, reverse=True)))  # of two names, the longer one
        tokens: list[str] = []
        start = 0
        for match in re.finditer(pattern, text):
            tokens += [*self._tokenize(text[start : match.start()]), match[match.lastindex or 0]]
            start = match.end()
        return tokens + self._tokenize(text[start:])

    def _pattern(self, name: str) -> str:
        """Regular expression of an added token, whose group is its name, with the space that it takes."""
        token = self.added_tokens_decoder[self.get_added_vocab()[name]]
        word = rf"(?<!\w)({re.escape(name)})(?!\w)" if token.single_word else f"({re.escape(name)})"
        return (r"\s*" if token.lstrip else "") + word + (r"\s*" if token.rstrip else "")

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        if not self._by_segments:
            return self._processor.encode(text, out_type=str)
        ids: list[int] = []
        start = 0
        for at in range(1, len(text) + 1):
            pair = text[at - 1 : at + 1].encode("utf-8", "surrogatepass") if at < len(text) else b""
            width = len(text[at - 1].encode("utf-8", "surrogatepass"))
            if pair[width - 1 : width + 1] not in self._held or not pair:
                ids += self._encode_segment(text[start:at])
                start = at
        return [self._processor.id_to_piece(index) for index in ids]

    def _encode_segment(self, segment: str) -> list[int]:
        out: list[int] = []
        for number, part in enumerate(segment.split(_SPACE)):
            if number:
                out += [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode("utf-8")]
            out += self._processor.encode(part)
        return out

    def _convert_token_to_id(self, token: str) -> int:
        return self._processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._processor.id_to_piece(index) if index < self.vocab_size else ""  # no token, as in fast tokenizers

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        added = self.get_added_vocab()
        text = ""
        for whole, group in itertools.groupby(filter(None, tokens), added.__contains__):
            run = list(group)
            text += "".join(run) if whole else self._processor.decode([self._processor.piece_to_id(t) for t in run])
        return text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        before = [self.bos_token_id] if self.add_bos_token else []
        after = [self.eos_token_id] if self.add_eos_token else []
        return [*before, *token_ids_0, *(token_ids_1 or []), *after]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        inner = [0] * (len(token_ids_0) + len(token_ids_1 or []))
        return [1] * self.add_bos_token + inner + [1] * self.add_eos_token

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        out = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "tokenizer.model")
        with open(out, "wb") as file:
            file.write(self._processor.serialized_model_proto())
        return (out,)


class _Framed(_Frame, PreTrainedTokenizerFast):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        frame = _frame(settings)
        super().__init__(*arguments, **settings, **frame)
        self.add_bos_token, self.add_eos_token = frame.values()


class ARMDTokenizerFast(_Framed):
    """Token ids of ``tokenizer.json``; a class with a constructor of its own would have its merges left out."""
