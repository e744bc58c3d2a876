"""Text -> tokenizer and packed shards, training and held-out: the first stage of a run.

``prepare`` makes a folder with ``tokenizer/``, ``train/`` and ``heldout/``; it appears when all is written. A
folder that was completed with the same settings is left as it is; one that was completed with others is refused.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from armd_scale import tokenizer as tokenizers
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.files import exclusive, write_atomically
from data_pipeline import readers, shards

_BATCH = 256  # documents that are tokenised at a time
_TRAINING_TEXT = 32 << 20  # bytes of text that a tokenizer is trained on


def prepare(config: RunConfig) -> dict[str, Any]:
    """Prepare the data of a run, or check what was prepared; returns the index of the training split."""
    folder = config.data_directory.resolve()
    with exclusive(folder.with_name(f".{folder.name}.lock"), f"the data in {folder}"):
        done = _completed(folder)
        return _prepare(config, folder) if done is None else _check(config, folder, done)


def _settings(config: RunConfig) -> dict[str, Any]:
    """All that the prepared data depends on; a source file by its name and size."""
    data = config.data
    sources = {
        name: [[file, Path(file).stat().st_size if file != readers.BUILTIN else sys.version] for file in found]
        for name, found in (("text", readers.files(data.text)), ("heldout_text", readers.files(data.heldout_text)))
    }
    return {
        **sources,
        "text_field": data.text_field,
        "heldout_fraction": data.heldout_fraction,
        "tokenizer": data.tokenizer,
        "vocab_size": None if data.tokenizer else data.vocab_size,
        "samples_per_shard": data.samples_per_shard,
        "length": config.model.length,
    }


def _check(config: RunConfig, folder: Path, done: dict[str, Any]) -> dict[str, Any]:
    try:
        settings = _settings(config)
    except UserError as error:  # the shards are what counts once they are there
        print(f"data: the text itself is gone, using the shards in {folder} ({error})", flush=True)
        settings = done["settings"]
    differing = [name for name in settings if done["settings"].get(name) != settings[name]]
    if differing:
        raise UserError(
            f"the data in {folder} was prepared with other settings ({', '.join(differing)}): "
            "choose another data.directory or remove the folder"
        )
    if config.data.verify:
        for split in ("train", "heldout"):
            shards.verify(folder / split)
    _check_prompt(config, tokenizers.load(folder / "tokenizer"))
    return shards.PackedDataset(folder / "train").index


def _prepare(config: RunConfig, final: Path) -> dict[str, Any]:
    if final.exists() and any(final.iterdir()):
        raise UserError(f"{final} holds something that is no prepared data: choose another data.directory or remove it")
    settings = _settings(config)
    if set(map(str, settings["text"])) & set(map(str, settings["heldout_text"])):
        raise UserError("data.text and data.heldout_text share files: what is held out must not be trained on")
    started = time.time()
    # Beside the final place and under another name until all is there.
    folder = final.with_name(f".{final.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = _tokenizer(config, folder / "tokenizer")
    _check_prompt(config, tokenizer)
    train, heldout = _splits(config)
    index = _write(folder / "train", train, tokenizer, config)
    heldout_index = _write(folder / "heldout", heldout, tokenizer, config)
    for name, part in (("text", index), ("held-out text", heldout_index)):
        if part["samples"] < 1:
            raise UserError(
                f"the {name} has only {part['tokens']} tokens, less than one sample of {config.model.length}: "
                "give more text" + (" or raise data.heldout_fraction" if part is heldout_index else "")
            )
    write_atomically(folder / "complete.json", json.dumps({"settings": settings}, indent=1))
    if final.exists():
        final.rmdir()
    os.replace(folder, final)
    print(
        f"data: {index['documents']} documents, {index['bytes'] / 1e6:.1f} MB, {index['tokens']:,} tokens to train; "
        f"{heldout_index['documents']} documents, {heldout_index['tokens']:,} tokens held out; "
        f"vocabulary {tokenizer.vocab_size}; {time.time() - started:.0f} s",
        flush=True,
    )
    return index


def _check_prompt(config: RunConfig, tokenizer: tokenizers.Tokenizer) -> None:
    """Find out now, not after the training, that the samples cannot be made."""
    count = len(tokenizer.encode(config.report.prompt))
    if count >= config.model.length:
        raise UserError(f"report.prompt has {count} tokens, the model takes {config.model.length}: shorten it")


def _completed(folder: Path) -> dict[str, Any] | None:
    """What a completed folder says of itself, None for one that is not complete."""
    path = folder / "complete.json"
    if not path.is_file():
        return None
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(done["settings"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove {folder} to prepare it again") from error
    return done


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
