"""The tokenizer of a model directory as a Hugging Face tokenizer: the tokens of training, BOS first.

- ``ARMDTokenizer``: for ``tokenizer.model``, needs sentencepiece;
- ``ARMDTokenizerFast``: for ``tokenizer.json``.
"""

import os
import shutil
from typing import Any

from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

try:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
except ImportError:
    pass  # a directory with tokenizer.json does without

_SPACE = "\u2581"


class ARMDTokenizer(PreTrainedTokenizer):
    """Token ids of ``tokenizer.model``.

    Text is encoded between the places that no piece reaches over, as training did; a U+2581 in a text, which
    sentencepiece takes for a space, is spelt in bytes.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012  (the library's name and type)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **settings: Any) -> None:
        self._file = vocab_file
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
        settings.setdefault("bos_token", self._processor.id_to_piece(self._processor.bos_id()))
        settings.setdefault("eos_token", self._processor.id_to_piece(self._processor.eos_id()))
        settings.setdefault("pad_token", settings["eos_token"])
        super().__init__(**settings)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {self._processor.id_to_piece(index): index for index in range(self.vocab_size)}

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
        return self._processor.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        special = {self.bos_token, self.eos_token}
        ids = [self._processor.piece_to_id(token) for token in tokens if token not in special]
        return self._processor.decode(ids)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None):  # type: ignore[no-untyped-def]
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        out = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "tokenizer.model")
        if os.path.abspath(out) != os.path.abspath(self._file):
            shutil.copyfile(self._file, out)
        return (out,)


class _BeginsWithBOS(PreTrainedTokenizerFast):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.add_bos_token = True  # in the settings, the library loses it


class ARMDTokenizerFast(_BeginsWithBOS):
    """Token ids of ``tokenizer.json``; a class with a constructor of its own would have its merges left out."""
