"""Text -> tokenizer and packed shards, training and held-out: the first stage of a run.

``prepare`` makes a folder with ``tokenizer/``, ``train/`` and ``heldout/``; it appears when all is written. A
folder that was completed with the same settings is left as it is; one that was completed with others is refused.

Two rounds of work that any number of processes share: units of text are tokenised (``units``), then shards are written,
each from the tokens that it holds. What comes out depends neither on the processes nor on interruptions.
"""

import concurrent.futures
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from armd_scale import tokenizer as tokenizers
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.files import exclusive, write_atomically
from data_pipeline import readers, shards, units
from data_pipeline.stream import open_mixture

_UNFILTERED = {"min_characters": 0, "max_characters": None, "deduplicate": False}
"""What data was prepared with before these settings existed."""
_COUNTS = ("records", *units.SPLITS, *units.REMOVED)
_SMALL = 4 << 20  # bytes or tokens that are done before other processes have started
_TRAINING_TEXT = 32 << 20  # bytes of text that a tokenizer is trained on


def prepare(config: RunConfig) -> dict[str, Any]:
    """Prepare the data of a run, or check what was prepared; returns the index of the training split."""
    folder = config.data_directory.resolve()
    with exclusive(folder.with_name(f".{folder.name}.lock"), f"the data in {folder}"):
        done = _completed(folder)
        index = _prepare(config, folder) if done is None else _check(config, folder, done)
    for data in open_mixture(config)[1:]:
        if config.data.verify:
            shards.verify(data.folder)
    return index


def _settings(config: RunConfig) -> dict[str, Any]:
    """All that the prepared data depends on; a source file by its name and size."""
    data = config.data
    sources = {
        name: [[file, readers.size(file) if file != readers.BUILTIN else sys.version] for file in found]
        for name, found in (("text", readers.files(data.text)), ("heldout_text", readers.files(data.heldout_text)))
    }
    return {
        **sources,
        "text_field": data.text_field,
        "heldout_fraction": data.heldout_fraction,
        "tokenizer": data.tokenizer,
        "vocab_size": None if data.tokenizer else data.vocab_size,
        "samples_per_shard": data.samples_per_shard,
        "min_characters": data.min_characters,
        "max_characters": data.max_characters,
        "deduplicate": data.deduplicate,
        "length": config.model.length,
    }


def _check(config: RunConfig, folder: Path, done: dict[str, Any]) -> dict[str, Any]:
    try:
        settings = _settings(config)
    except UserError as error:  # the shards are what counts once they are there
        print(f"data: the text itself is gone, using the shards in {folder} ({error})", flush=True)
        settings = done["settings"]
    before = {**_UNFILTERED, **done["settings"]}
    differing = [name for name in settings if before.get(name) != settings[name]]
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
    # Beside the final place and under another name until all is there; what an interrupted one has done is used.
    folder = final.with_name(f".{final.name}.partial")
    _begin(folder, settings)
    tokenizer = _tokenizer(config, folder / "tokenizer")
    _check_prompt(config, tokenizer)
    counts = _tokenise(config, folder)
    common = {
        "tokenizer_sha256": tokenizers.digest(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }
    indices = {split: _pack(config, folder, split, common) for split in units.SPLITS}
    for name, part in (("text", indices["train"]), ("held-out text", indices["heldout"])):
        if part["samples"] < 1:
            raise UserError(
                f"the {name} has only {part['tokens']} tokens, less than one sample of {config.model.length}: "
                "give more text" + (" or raise data.heldout_fraction" if name != "text" else "")
            )
    shutil.rmtree(folder / "work")
    write_atomically(folder / "complete.json", json.dumps({"settings": settings, "records": counts}, indent=1))
    if final.exists():
        final.rmdir()
    os.replace(folder, final)
    train, heldout = indices["train"], indices["heldout"]
    print(
        f"data: {train['documents']} documents, {train['bytes'] / 1e6:.1f} MB, {train['tokens']:,} tokens to train; "
        f"{heldout['documents']} documents, {heldout['tokens']:,} tokens held out{_left_out(counts)}; "
        f"vocabulary {tokenizer.vocab_size}; {time.time() - started:.0f} s",
        flush=True,
    )
    return train


def _left_out(counts: dict[str, int]) -> str:
    removed = [f"{counts[name]} {name}" for name in (*units.REMOVED, "duplicate") if counts[name]]
    return f"; left out: {', '.join(removed)}" if removed else ""


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Keep a folder that was begun with the same settings, else start anew."""
    path = folder / "work/settings.json"
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(settings))
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("work", *units.SPLITS):
            (folder / name).mkdir(parents=True)
        write_atomically(path, json.dumps(settings))


def _tokenise(config: RunConfig, folder: Path) -> dict[str, int]:
    """Do all units; how many records there were and where they went. ``UserError`` when too many are bad."""
    data = config.data
    job = units.Job(
        folder=str(folder),
        field=data.text_field,
        heldout_fraction=0.0 if data.heldout_text else data.heldout_fraction,
        min_characters=data.min_characters,
        max_characters=data.max_characters,
        units=units.cut({name: readers.files(getattr(data, name)) for name in ("text", "heldout_text")}),
    )
    job.save()
    numbers = range(len(job.units))
    sizes = [sum(part.size for part in parts) for _, parts in job.units]
    facts = _map(config, "tokenised", units.tokenise, [(str(folder), number) for number in numbers], sizes)
    counts = {name: sum(fact[name] for fact in facts) for name in facts[0]} if facts else dict.fromkeys(_COUNTS, 0)
    _report_bad(config, folder, [job.place(number) for number in numbers], counts)
    lost = units.drop_duplicates(str(folder)) if data.deduplicate and facts else dict.fromkeys(units.SPLITS, 0)
    counts["duplicate"] = sum(lost.values())
    for split, count in lost.items():
        counts[split] -= count
    return counts


def _report_bad(config: RunConfig, folder: Path, places: list[Path], counts: dict[str, int]) -> None:
    """Collect the list of bad records beside the data; too many of them are an error."""
    if not counts["bad"]:
        return
    path = folder / "bad.jsonl"
    lines = [line for place in places for line in (place / "bad.jsonl").read_text(encoding="utf-8").splitlines()]
    write_atomically(path, "".join(line + "\n" for line in lines))
    share = counts["bad"] / counts["records"]
    if share > config.data.max_bad_fraction:
        first = json.loads(lines[0])
        raise UserError(
            f"{counts['bad']} of {counts['records']} records cannot be used, more than data.max_bad_fraction = "
            f"{config.data.max_bad_fraction}; the first: {first['place']} {first['problem']}; all are in {path}"
        )


def _pack(config: RunConfig, folder: Path, split: str, common: dict[str, Any]) -> dict[str, Any]:
    """Write all shards of a split and its index; returns the index."""
    length = config.model.length
    stream = units.Stream(str(folder), split)
    places = shards.cut(len(stream), length, config.data.samples_per_shard)
    work = [(str(folder), split, place, length) for place in places]
    written = _map(config, f"{split} shards", units.write_shard, work, [place.stop - place.start for place in places])
    for leftover in (folder / split).glob(".*"):  # of processes that were killed
        leftover.unlink()
    documents = stream.totals()
    return shards.write_index(folder / split, written, length, {"tokens": len(stream), **common, **documents})


def _map(
    config: RunConfig, what: str, work: Callable[..., dict[str, Any]], items: list[tuple[Any, ...]], sizes: list[int]
) -> list[dict[str, Any]]:
    """``work(*item)`` for all items in processes of this machine; the results in their order."""
    workers = min(config.data.workers or len(os.sched_getaffinity(0)), len(items))
    if workers <= 1 or sum(sizes) < _SMALL:
        return [work(*item) for item in items]
    progress = _Progress(what, sum(sizes))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_one_thread) as pool:
        futures = [pool.submit(work, *item) for item in items]
        done = dict(zip(futures, sizes, strict=True))
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                progress.add(done[future])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _one_thread() -> None:
    """The processes are the parallelism: a tokenizer that starts threads of its own would only be in their way."""
    os.environ["RAYON_NUM_THREADS"] = "1"


class _Progress:
    """A line every ten seconds: how much is done, how fast, and how long it will take."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, max(1, total), 0
        self._started = self._said = time.monotonic()

    def add(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if now - self._said >= 10:
            self._said = now
            speed = self._done / (now - self._started)
            left = (self._total - self._done) / speed
            print(
                f"data: {self._what} {self._done / self._total:.0%}, {speed / 1e6:.1f} M/s, {left / 60:.1f} min left",
                flush=True,
            )


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
        if not tokenizers.gives_back(tokenizer):
            print(f"data: the tokenizer {tokenizer.path} does not give every text back as it was", flush=True)
        return tokenizer
    path = folder / "tokenizer.model"
    if path.is_file():  # of an interrupted preparation with the same settings
        return tokenizers.load(path)
    return tokenizers.train(paragraphs(_training_text(config)), path, config.data.vocab_size, config.seed)


def _training_text(config: RunConfig) -> Iterator[str]:
    """Documents that are not held out."""
    data = config.data
    for part in readers.parts(readers.files(data.text)):
        for record in readers.read(part, data.text_field):
            held_out = not data.heldout_text and units.held_out(record.text, data.heldout_fraction)
            if not record.problem and record.text.strip() and not held_out:
                yield record.text


def paragraphs(documents: Iterable[str]) -> Iterator[str]:
    """Paragraphs of the first documents, enough to train a tokenizer on."""
    size = 0
    for document in documents:
        for paragraph in document.split("\n\n"):
            if paragraph.strip():
                yield paragraph + "\n"
        size += len(document)
        if size > _TRAINING_TEXT:
            return
