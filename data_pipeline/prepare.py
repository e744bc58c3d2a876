"""Prepares the data of a run: text -> tokenizer and packed shards, training and held-out.

``prepare`` writes ``tokenizer/``, ``train/`` and ``heldout/`` to a temporary directory, which is renamed when complete.
A complete directory with the same settings is reused; a complete directory with other settings is refused.

Preparation has five steps, which can be repeated after an interruption:

1. ``begin``: tokenizer and list of units;
2. ``tokenise``: units (``units``), shared by any number of processes and jobs without locks;
3. ``merge``: counts and duplicates;
4. ``pack``: shards, shared like units;
5. ``finish``: indices and tables.

The prepared data depends on the text and the settings only.
"""

import concurrent.futures
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from armd_scale.config import RunConfig
from armd_scale.data import readers, shards
from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError
from armd_scale.files import exclusive, write_atomically
from armd_scale.logs import DATA as log
from data_pipeline import documents, units

_BEFORE = {
    "min_characters": 0,
    "max_characters": None,
    "deduplicate": False,
    "id_field": "id",
    "source_field": "source",
}
"""Values of settings that did not exist when older data was prepared."""
_SMALL = 4 << 20  # bytes or tokens below which processes are not worth their start
_TRAINING_TEXT = 32 << 20  # bytes of text for the training of a tokenizer
_MOST_SOURCES = 50  # sources that an index lists by name


def prepare(config: RunConfig) -> dict[str, Any]:
    """Prepare the data of a run in this job, or check existing data; returns the index of the training split."""
    with _lock(config):
        if begin(config):
            tokenise(config)
            merge(config)
            pack(config)
            return finish(config)
    return shards.PackedDataset(config.data_directory / "train").index


def step(config: RunConfig, name: str, share: int = 0, shares: int = 1) -> Any:
    """Do a step of the preparation. Several jobs can share ``tokenise`` and ``pack``."""
    if name in ("tokenise", "pack"):
        return {"tokenise": tokenise, "pack": pack}[name](config, share, shares)
    with _lock(config):
        return {"begin": begin, "merge": merge, "finish": finish}[name](config)


def begin(config: RunConfig) -> bool:
    """Begin or resume a preparation; False if the data is complete. ``UserError`` if the directory holds other data."""
    final = config.data_directory.resolve()
    record = _completed(final)
    if record is not None:
        _check(config, final, record)
        return False
    if final.exists() and any(final.iterdir()):
        raise UserError(f"{final} holds files but no prepared data: choose another data.directory or remove it")
    sources = _sources(config)
    if set(sources["text"]) & set(sources["heldout_text"]):
        raise UserError("data.text and data.heldout_text share files: remove the held-out files from data.text")
    folder = _partial(config)
    _keep_or_clear(folder, _settings(config, sources))
    _check_prompt(config, _tokenizer(config, folder / "tokenizer", sources["text"]))
    data = config.data
    units.Job(
        folder=str(folder),
        fields=readers.Fields(data.text_field, data.id_field, data.source_field),
        heldout_fraction=0.0 if data.heldout_text else data.heldout_fraction,
        min_characters=data.min_characters,
        max_characters=data.max_characters,
        units=units.cut(sources),
    ).save()
    return True


def tokenise(config: RunConfig, share: int = 0, shares: int = 1) -> None:
    """Tokenise a share of the units in processes of this machine."""
    folder = _partial(config)
    job = units.Job.load(str(folder))
    numbers = range(share, len(job.units), shares)
    sizes = [sum(part.size for part in job.units[number][1]) for number in numbers]
    _map(config, "tokenised", units.tokenise, [(str(folder), number) for number in numbers], sizes)


def merge(config: RunConfig) -> None:
    """Add up the counts of the units, and mark duplicates. ``UserError`` if too many records are bad."""
    folder = _partial(config)
    job = units.Job.load(str(folder))
    facts = [units.tokenise(str(folder), number) for number in range(len(job.units))]
    counts = {name: sum(fact[name] for fact in facts) for name in ("records", *units.SPLITS, *units.REMOVED)}
    _report_bad(config, folder, [job.place(number) for number in range(len(facts))], counts)
    dedupe = config.data.deduplicate and facts
    lost = units.drop_duplicates(str(folder)) if dedupe else dict.fromkeys(units.SPLITS, 0)
    counts["duplicate"] = sum(lost.values())
    for split, count in lost.items():
        counts[split] -= count
    write_atomically(folder / "work/counts.json", json.dumps(counts))


def pack(config: RunConfig, share: int = 0, shares: int = 1) -> None:
    """Write a share of the shards in processes of this machine."""
    folder = _partial(config)
    for split in units.SPLITS:
        places = _places(config, units.open_stream(str(folder), split))[share::shares]
        work = [(str(folder), split, place, config.model.length) for place in places]
        sizes = [place.stop - place.start for place in places]
        _map(config, f"{split} shards", units.write_shard, work, sizes)


def finish(config: RunConfig) -> dict[str, Any]:
    """Write the indices and rename the directory; returns the index of the training split."""
    folder, final = _partial(config), config.data_directory.resolve()
    tokenizer = tokenizers.load(folder / "tokenizer")
    train, heldout = (_close(config, folder, split, tokenizer) for split in units.SPLITS)
    for name, part in (("text", train), ("held-out text", heldout)):
        if part["samples"] < 1:
            raise UserError(
                f"the {name} has only {part['tokens']} tokens, less than one sample of {config.model.length}: "
                "give more text" + (" or raise data.heldout_fraction" if name != "text" else "")
            )
    settings, counts = (
        json.loads((folder / "work" / name).read_text(encoding="utf-8")) for name in ("settings.json", "counts.json")
    )
    shutil.rmtree(folder / "work")
    write_atomically(folder / "complete.json", json.dumps({"settings": settings, "records": counts}, indent=1))
    if final.exists():
        final.rmdir()
    os.replace(folder, final)
    log.info(
        f"{train['documents']} documents, {train['bytes'] / 1e6:.1f} MB, {train['tokens']:,} tokens to train; "
        f"{heldout['documents']} documents, {heldout['tokens']:,} tokens held out{_left_out(counts)}; "
        f"vocabulary {tokenizer.vocab_size}"
    )
    return train


def _lock(config: RunConfig) -> Any:
    folder = config.data_directory.resolve()
    return exclusive(folder.with_name(f".{folder.name}.lock"), f"the data in {folder}")


def _partial(config: RunConfig) -> Path:
    """The temporary directory of a preparation, beside the data directory."""
    folder = config.data_directory.resolve()
    return folder.with_name(f".{folder.name}.partial")


def _sources(config: RunConfig) -> dict[str, list[str]]:
    """The files of the training and of the held-out text."""
    return {"text": readers.files(config.data.text), "heldout_text": readers.files(config.data.heldout_text)}


def _settings(config: RunConfig, sources: dict[str, list[str]]) -> dict[str, Any]:
    """All settings that the prepared data depends on; source files are identified by name and size."""
    data = config.data
    return {
        **{
            name: [[file, readers.size(file) if file != readers.BUILTIN else sys.version] for file in files]
            for name, files in sources.items()
        },
        "text_field": data.text_field,
        "id_field": data.id_field,
        "source_field": data.source_field,
        "heldout_fraction": data.heldout_fraction,
        "tokenizer": data.tokenizer,
        "vocab_size": None if data.tokenizer else data.vocab_size,
        "samples_per_shard": data.samples_per_shard,
        "min_characters": data.min_characters,
        "max_characters": data.max_characters,
        "deduplicate": data.deduplicate,
        "length": config.model.length,
    }


def _check(config: RunConfig, folder: Path, record: dict[str, Any]) -> None:
    before = {**_BEFORE, **record["settings"]}
    try:
        settings = _settings(config, _sources(config))
    except UserError as error:  # complete shards do not need their text
        log.warning("the text is missing, using the shards in %s (%s)", folder, error)
        gone = {name: before[name] for name in ("text", "heldout_text")}
        settings = _settings(config, {"text": [], "heldout_text": []}) | gone
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing:
        raise UserError(
            f"the data in {folder} was prepared with other settings ({', '.join(differing)}): "
            "choose another data.directory or remove the directory"
        )
    _check_prompt(config, tokenizers.load(folder / "tokenizer"))


def _left_out(counts: dict[str, int]) -> str:
    removed = [f"{counts[name]} {name}" for name in (*units.REMOVED, "duplicate") if counts[name]]
    return f"; left out: {', '.join(removed)}" if removed else ""


def _keep_or_clear(folder: Path, settings: dict[str, Any]) -> None:
    """Keep a temporary directory with the same settings, else clear it."""
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


def _report_bad(config: RunConfig, folder: Path, places: list[Path], counts: dict[str, int]) -> None:
    """Write the list of bad records to ``bad.jsonl``; ``UserError`` if there are too many."""
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
            f"{config.data.max_bad_fraction}: fix the records in {path}, or raise it; the first: "
            f"{first['place']} {first['problem']}"
        )


def _places(config: RunConfig, stream: units.Stream) -> list[shards.Place]:
    return shards.cut(len(stream), config.model.length, config.data.samples_per_shard)


def _close(config: RunConfig, folder: Path, split: str, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Write the table of documents and the index of a split; returns the index."""
    stream, length = units.open_stream(str(folder), split), config.model.length
    places = _places(config, stream)
    written = [units.write_shard(str(folder), split, place, length) for place in places]
    for leftover in (folder / split).glob(".*"):  # temporary files of killed processes
        leftover.unlink()
    edges = [0, *(place.stop for place in places)]
    sources = documents.write(folder / split, stream.tables(), edges)
    written = [{**shard, "sources": _most(counts)} for shard, counts in zip(written, sources, strict=True)]
    facts = {
        "tokens": len(stream),
        "tokenizer_sha256": tokenizers.digest(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        **stream.totals(),
        "sources": _most(sum(sources, Counter())),
    }
    return shards.write_index(folder / split, written, length, facts)


def _most(counts: Counter[str]) -> dict[str, int]:
    """The sources with most tokens; the empty name stands for all other sources."""
    most = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST_SOURCES])
    rest = counts.total() - sum(most.values())
    return most | ({"": rest} if rest else {})


def _map(
    config: RunConfig, what: str, work: Callable[..., dict[str, Any]], items: list[tuple[Any, ...]], sizes: list[int]
) -> None:
    """``work(*item)`` for all items in processes of this machine."""
    workers = min(config.data.workers or len(os.sched_getaffinity(0)), len(items))
    if workers <= 1 or sum(sizes) < _SMALL:
        for item in items:
            work(*item)
        return
    progress = _Progress(what, sum(sizes))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_one_thread) as pool:
        futures = {pool.submit(work, *item): size for item, size in zip(items, sizes, strict=True)}
        try:
            for future in concurrent.futures.as_completed(futures):
                progress.add(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _one_thread() -> None:
    """Keep tokenizers from starting threads in worker processes."""
    os.environ["RAYON_NUM_THREADS"] = "1"


class _Progress:
    """Logs a line every ten seconds: share, throughput and remaining time of the work."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, max(1, total), 0
        self._facts: Counter[str] = Counter()
        self._started = self._said = time.monotonic()

    def add(self, size: int, facts: dict[str, Any]) -> None:
        """Add a finished piece of work; ``size``: its size in the unit of the total; ``facts``: its counts."""
        self._done += size
        for name in ("records", "samples", "bytes", "size", "tokens"):
            self._facts[name] += facts.get(name, 0)
        now = time.monotonic()
        if now - self._said >= 10:
            self._said = now
            log.info(self.line(now - self._started))

    def line(self, seconds: float) -> str:
        """The line after ``seconds`` seconds."""
        facts = self._facts
        rates = [
            f"{facts[name] / seconds / scale:,.{digits}f} {unit}/s"
            for name, scale, digits, unit in (
                ("records", 1, 0, "documents"), ("samples", 1, 0, "samples"), ("bytes", 1e6, 1, "MB"),
                ("size", 1e6, 1, "MB"), ("tokens", 1e6, 2, "M tokens"),
            )
            if facts[name]
        ]  # fmt: skip
        left = (self._total - self._done) / self._done * seconds
        return f"{self._what} {self._done / self._total:.0%}, {', '.join(rates)}, {left / 60:.1f} min left"


def _check_prompt(config: RunConfig, tokenizer: tokenizers.Tokenizer) -> None:
    """``UserError`` if the prompt of the report leaves no room for text, found before the training."""
    count = len(tokenizer.encode(config.report.prompt))
    if count >= config.model.length:
        raise UserError(f"report.prompt has {count} tokens but model.length is {config.model.length}: shorten it")


def _completed(folder: Path) -> dict[str, Any] | None:
    """``complete.json`` of a data directory; None if the directory is not complete."""
    path = folder / "complete.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(record["settings"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove {folder} to prepare it again") from error
    return record


def _tokenizer(config: RunConfig, folder: Path, text: list[str]) -> tokenizers.Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    if config.data.tokenizer:
        tokenizer = tokenizers.load(config.data.tokenizer)
        tokenizers.copy(tokenizer, folder)
        if not tokenizers.gives_back(tokenizer):
            log.warning("the tokenizer %s does not restore every text when decoding", tokenizer.path)
        return tokenizer
    path = folder / "tokenizer.model"
    if path.is_file():  # from an interrupted preparation with the same settings
        return tokenizers.load(path)
    return tokenizers.train(paragraphs(_training_text(config, text)), path, config.data.vocab_size, config.seed)


def _training_text(config: RunConfig, text: list[str]) -> Iterator[str]:
    """Documents for the training of a tokenizer: those that are not held out."""
    data = config.data
    for part in readers.parts(text):
        for record in readers.read(part, readers.Fields(data.text_field)):
            held_out = not data.heldout_text and units.held_out(record.text, data.heldout_fraction)
            if not record.problem and record.text.strip() and not held_out:
                yield record.text


def paragraphs(documents: Iterable[str]) -> Iterator[str]:
    """Paragraphs of the first ``_TRAINING_TEXT`` characters, for the training of a tokenizer."""
    size = 0
    for document in documents:
        for paragraph in document.split("\n\n"):
            if paragraph.strip():
                yield paragraph + "\n"
        size += len(document)
        if size > _TRAINING_TEXT:
            return
