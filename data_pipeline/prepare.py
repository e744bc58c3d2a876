"""Text -> tokenizer and packed shards, training and held-out: the first stage of a run.

``prepare`` fills a folder with ``tokenizer/``, ``train/`` and ``heldout/``. A folder that was completed with the
same settings is left as it is; one that was completed with others is refused.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from armd_scale import tokenizer as tokenizers
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from data_pipeline import readers, shards

_BATCH = 256  # documents that are tokenised at a time
_TRAINING_TEXT = 32 << 20  # bytes of text that a tokenizer is trained on


def prepare(config: RunConfig) -> dict[str, Any]:
    """Prepare the data of a run; returns the index of the training split."""
    folder = config.data_directory
    settings = {
        "text": config.data.text,
        "text_field": config.data.text_field,
        "heldout_text": config.data.heldout_text,
        "heldout_fraction": config.data.heldout_fraction,
        "tokenizer": config.data.tokenizer,
        "vocab_size": None if config.data.tokenizer else config.data.vocab_size,
        "samples_per_shard": config.data.samples_per_shard,
        "length": config.model.length,
        "python": sys.version if readers.BUILTIN in config.data.text else None,
    }
    done = _completed(folder)
    if done is not None:
        differing = [name for name in settings if done["settings"].get(name) != settings[name]]
        if differing:
            raise UserError(
                f"the data in {folder} was prepared with other settings ({', '.join(differing)}): "
                "choose another data.directory or remove the folder"
            )
        return done["train"]
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    tokenizer = _tokenizer(config, folder / "tokenizer")
    train, heldout = _splits(config)
    index = _write(folder / "train", train, tokenizer, config)
    heldout_index = _write(folder / "heldout", heldout, tokenizer, config)
    for name, part in (("text", index), ("held-out text", heldout_index)):
        if part["samples"] < 1:
            raise UserError(
                f"the {name} has only {part['tokens']} tokens, less than one sample of {config.model.length}: "
                "give more text" + (" or raise data.heldout_fraction" if part is heldout_index else "")
            )
    shards.write_atomically(folder / "complete.json", json.dumps({"settings": settings}, indent=1))
    print(
        f"data: {index['documents']} documents, {index['bytes'] / 1e6:.1f} MB, {index['tokens']:,} tokens to train; "
        f"{heldout_index['documents']} documents, {heldout_index['tokens']:,} tokens held out; "
        f"vocabulary {tokenizer.vocab_size}; {time.time() - started:.0f} s",
        flush=True,
    )
    return index


def _completed(folder: Path) -> dict[str, Any] | None:
    """Settings and training index of a folder that was completed, else None."""
    if not (folder / "complete.json").is_file():
        return None
    try:
        done = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'complete.json'} is damaged: {error}; remove {folder}") from error
    return {**done, "train": shards.PackedDataset(folder / "train").index}


def _tokenizer(config: RunConfig, folder: Path) -> tokenizers.Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    if config.data.tokenizer:
        tokenizer = tokenizers.load(config.data.tokenizer)
        tokenizers.copy(tokenizer, folder)
        return tokenizer
    path = folder / "tokenizer.model"
    return tokenizers.train(_paragraphs(_splits(config)[0]), path, config.data.vocab_size, config.seed)


def _paragraphs(documents: Iterable[str]) -> Iterator[str]:
    """Paragraphs of the first documents, enough to train a tokenizer on."""
    size = 0
    for document in documents:
        for paragraph in document.split("\n\n"):
            if paragraph.strip():
                yield paragraph + "\n"
        size += len(document)
        if size > _TRAINING_TEXT:
            return


def _splits(config: RunConfig) -> tuple[Iterator[str], Iterator[str]]:
    """Documents to train on, and documents held out."""
    data = config.data
    if data.heldout_text:
        return (
            readers.documents(data.text, data.text_field),
            readers.documents(data.heldout_text, data.text_field),
        )

    def part(heldout: bool) -> Iterator[str]:
        for text in readers.documents(data.text, data.text_field):
            if _held_out(text, data.heldout_fraction) == heldout:
                yield text

    return part(False), part(True)


def _held_out(text: str, fraction: float) -> bool:
    """Whether a document is held out: by its hash, so its duplicates are too."""
    word = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]
    return int.from_bytes(word, "little") < fraction * 2**64


def _write(
    folder: Path, documents: Iterator[str], tokenizer: tokenizers.Tokenizer, config: RunConfig
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "tokenizer_sha256": tokenizers.digest(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "documents": 0,
        "bytes": 0,
    }

    def encoded() -> Iterator[list[int]]:
        batch: list[str] = []
        for text in documents:
            batch.append(text)
            facts["documents"] += 1
            facts["bytes"] += len(text.encode("utf-8", "surrogatepass"))
            if len(batch) == _BATCH:
                yield from tokenizer.encode_batch(batch)
                batch.clear()
        yield from tokenizer.encode_batch(batch)

    samples = shards.pack(encoded(), tokenizer.eos_id, config.model.length)
    return shards.write(folder, samples, config.model.length, config.data.samples_per_shard, facts)
