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
import contextlib
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from armd_scale.config import RunConfig
from armd_scale.data import chat, readers, shards, sources
from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError
from armd_scale.files import exclusive, write_atomically
from armd_scale.logs import DATA as log
from armd_scale.processes import die_with_parent
from data_pipeline import documents, holdout, train_tokenizer, units
from data_pipeline.holdout import SPLITS

_BEFORE = {
    "min_characters": 0,
    "max_characters": None,
    "deduplicate": False,
    "id_field": "id",
    "source_field": "source",
    "txt_document": "file",
    "pack": "stream",
    "messages_field": None,
    "prompt_field": None,
}
"""Values of settings that did not exist when older data was prepared."""
_SMALL = 4 << 20  # bytes or tokens below which processes are not worth their start
_MOST_SOURCES = 50  # sources that an index lists by name


def prepare(config: RunConfig) -> dict[str, Any]:
    """Prepare the data of a run in this job, or check existing data; returns the index of the training split."""
    if not _is_complete(config):  # a data set that others prepared can be read-only
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
    if _is_complete(config):
        return False
    final = config.data_directory.resolve()
    if final.exists() and any(final.iterdir()):
        raise UserError(f"{final} holds files but no prepared data: choose another data.directory or remove it")
    files = _files(config)
    folder = _partial(config)
    settings = {**_options(config), "sources": _sources(config), **_fingerprints(config, files)}
    _keep_or_clear(config, folder, settings)
    data = config.data
    fields = readers.Fields(
        data.text_field, data.id_field, data.source_field, data.txt_document, data.messages_field, data.prompt_field
    )
    rule = (
        holdout.NOTHING if data.heldout_text else holdout.plan(_documents(files["text"], fields), data.heldout_fraction)
    )
    if fields.in_records and rule.tail:
        raise UserError("data.text has too few documents to hold some of them out whole: give data.heldout_text")
    if fields.messages and not config.tokenizer:
        raise UserError("data.messages_field needs a tokenizer with a chat template: set data.tokenizer")
    tokenizer = _tokenizer(config, folder / "tokenizer", files["text"], fields, rule)
    if fields.messages and chat.load(tokenizer) is None:
        raise UserError(
            f"data.messages_field needs a chat template: put chat_template.jinja beside {config.tokenizer}, or name "
            "another data.tokenizer"
        )
    _check_prompt(config, tokenizer)
    units.Job(
        folder=str(folder),
        fields=fields,
        heldout=rule,
        min_characters=data.min_characters,
        max_characters=data.max_characters,
        units=units.cut(files, fields),
        length=config.model.length,
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
    """Add up the counts of the units, and mark duplicates.

    ``UserError`` if too many records are bad, or if a file has changed since the preparation began.
    """
    folder = _partial(config)
    settings = json.loads((folder / "work/settings.json").read_text(encoding="utf-8"))
    changed = _changed_files(config, settings, "mtime")
    if changed:
        raise UserError(f"text changed while it was prepared ({', '.join(changed)}): run the same command again")
    job = units.Job.load(str(folder))
    facts = [units.tokenise(str(folder), number) for number in range(len(job.units))]
    counts = {name: sum(fact[name] for fact in facts) for name in ("records", *SPLITS, *units.REMOVED)}
    _report_bad(config, folder, [job.place(number) for number in range(len(facts))], counts)
    dedupe = config.data.deduplicate and facts
    lost = units.drop_duplicates(str(folder)) if dedupe else dict.fromkeys(SPLITS, 0)
    counts["duplicate"] = sum(lost.values())
    for split, count in lost.items():
        counts[split] -= count
    if config.data.pack == "best-fit":
        for split in SPLITS:
            units.pack(str(folder), split, config.model.length)
    write_atomically(folder / "work/counts.json", json.dumps(counts))


def pack(config: RunConfig, share: int = 0, shares: int = 1) -> None:
    """Write a share of the shards in processes of this machine."""
    folder = _partial(config)
    for split in SPLITS:
        places = _places(config, units.open_packed(str(folder), split))[share::shares]
        work = [(str(folder), split, place, config.model.length) for place in places]
        sizes = [place.stop - place.start for place in places]
        _map(config, f"{split} shards", units.write_shard, work, sizes)


def finish(config: RunConfig) -> dict[str, Any]:
    """Write the indices and rename the directory; returns the index of the training split."""
    folder, final = _partial(config), config.data_directory.resolve()
    tokenizer = tokenizers.load(folder / "tokenizer")
    train, heldout = (_close(config, folder, split, tokenizer) for split in SPLITS)
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
    return exclusive(folder.with_name(f".{folder.name}.lock"), f"the data in {folder}", wait=True)


def _partial(config: RunConfig) -> Path:
    """The temporary directory of a preparation, beside the data directory."""
    folder = config.data_directory.resolve()
    return folder.with_name(f".{folder.name}.partial")


def _sources(config: RunConfig) -> dict[str, list[str]]:
    return {"text": config.data.text, "heldout_text": config.data.heldout_text}


def _files(config: RunConfig) -> dict[str, list[str]]:
    """The files of the training and of the held-out text."""
    expanded = {name: sources.expand(names) for name, names in _sources(config).items()}
    left_out = expanded["text"].left_out + expanded["heldout_text"].left_out
    if left_out:
        log.warning(sources.describe(left_out))
    training = set(map(sources.identity, expanded["text"].names))
    shared = [name for name in expanded["heldout_text"].names if sources.identity(name) in training]
    if shared:
        raise UserError(
            f"data.text and data.heldout_text share files: remove the held-out files from data.text ({shared[0]})"
        )
    return {name: files.names for name, files in expanded.items()}


def _documents(files: list[str], fields: readers.Fields) -> Iterator[str]:
    """The usable documents of files."""
    for part in readers.parts(files, fields):
        yield from (record.text for record in readers.read(part, fields) if record.text.strip())


def _options(config: RunConfig) -> dict[str, Any]:
    """The settings that the prepared data depends on, apart from the text."""
    data = config.data
    return {
        "text_field": data.text_field,
        "id_field": data.id_field,
        "source_field": data.source_field,
        "txt_document": data.txt_document,
        "heldout_fraction": data.heldout_fraction,
        "tokenizer": tokenizers.identity(_given_tokenizer(config)) if config.tokenizer else None,
        "vocab_size": None if config.tokenizer else data.vocab_size,
        "samples_per_shard": data.samples_per_shard,
        "min_characters": data.min_characters,
        "max_characters": data.max_characters,
        "deduplicate": data.deduplicate,
        "length": config.model.length,
        "pack": data.pack,
        "messages_field": data.messages_field,
        "prompt_field": data.prompt_field,
    }


def _fingerprints(config: RunConfig, files: dict[str, list[str]]) -> dict[str, list[list[Any]]]:
    check = config.data.check_text
    return {name: [sources.fingerprint(file, check) for file in names] for name, names in files.items()}


def _given_tokenizer(config: RunConfig) -> tokenizers.Tokenizer:
    """The tokenizer of the configuration."""
    assert config.tokenizer is not None
    return tokenizers.load(config.tokenizer, bos=config.data.bos_token, eos=config.data.eos_token)


def _is_complete(config: RunConfig) -> bool:
    """Whether the data is complete. ``UserError`` if it was prepared with other settings or from other text."""
    folder = config.data_directory.resolve()
    record = _completed(folder)
    if record is None:
        return False
    before = {**_BEFORE, **record["settings"]}
    tokenizer = tokenizers.load(folder / "tokenizer")
    if isinstance(before["tokenizer"], str):  # a path, in data of version 0.1
        before["tokenizer"] = tokenizers.identity(tokenizer)
    try:
        options = _options(config)
    except UserError as error:  # complete shards do not need the original of their tokenizer
        if Path(str(config.tokenizer)).expanduser().exists():
            raise
        log.warning("the tokenizer is missing, using the tokenizer in %s (%s)", folder, error)
        options = _options(config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": None})}))
        options |= {name: before[name] for name in ("tokenizer", "vocab_size")}
    differing = [name for name, value in options.items() if before.get(name) != value]
    try:
        differing += _changed_files(config, before, config.data.check_text)
    except UserError as error:  # nor do they need their text
        log.warning("the text is missing, using the shards in %s (%s)", folder, error)
    if differing:
        raise UserError(
            f"the data in {folder} was prepared with other settings ({', '.join(differing)}): "
            "choose another data.directory or remove the directory"
        )
    _check_prompt(config, tokenizer)
    return True


def _changed_files(config: RunConfig, before: dict[str, Any], check: sources.Check) -> list[str]:
    """What has changed in the text since the settings ``before`` were recorded.

    Remote files are not looked up again: a changed list of sources is noticed, a changed file is not.
    """
    changed = []
    for name, patterns in _sources(config).items():
        known = before.get("sources", {}).get(name)
        if any(map(sources.is_remote, patterns)) and known not in (None, patterns):
            changed.append(f"data.{name}")
            continue
        local = sources.expand([pattern for pattern in patterns if not sources.is_remote(pattern)]).names
        recorded = {entry[0]: entry for entry in before[name] if not sources.is_remote(entry[0])}
        for file in [file for file in recorded if file not in local]:
            changed.append(f"{file} is missing")
        for file in local:
            now = sources.fingerprint(file, check)
            if file not in recorded:
                changed.append(f"{file} is new")
            elif not sources.unchanged(recorded[file], now, check):
                hint = "; data.check_text=size accepts a copy" if recorded[file][1] == now[1] else ""
                changed.append(f"{file} has changed{hint}")
    return changed


def _left_out(counts: dict[str, int]) -> str:
    removed = [f"{counts[name]} {name}" for name in (*units.REMOVED, "duplicate") if counts[name]]
    return f"; left out: {', '.join(removed)}" if removed else ""


def _keep_or_clear(config: RunConfig, folder: Path, settings: dict[str, Any]) -> None:
    """Keep a temporary directory with the same settings, else clear it."""
    path = folder / "work/settings.json"
    before: dict[str, Any] | None = None
    with contextlib.suppress(OSError, ValueError):
        before = json.loads(path.read_text(encoding="utf-8"))
    if before is not None:
        texts = {"text", "heldout_text"}
        differing = [name for name in settings if name not in texts and before.get(name) != settings[name]]
        differing = differing or _changed_files(config, before, config.data.check_text)
        if not differing:
            return
        log.warning("the preparation starts again, as %s changed since it was interrupted", ", ".join(differing))
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("work", *SPLITS):
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


def _places(config: RunConfig, stream: units.Stream | units.Packed) -> list[shards.Place]:
    return shards.cut(len(stream), config.model.length, config.data.samples_per_shard)


def _close(config: RunConfig, folder: Path, split: str, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Write the table of documents and the index of a split; returns the index."""
    stream, length = units.open_packed(str(folder), split), config.model.length
    places = _places(config, stream)
    written = [units.write_shard(str(folder), split, place, length) for place in places]
    for leftover in (folder / split).glob(".*"):  # temporary files of killed processes
        leftover.unlink()
    edges = [0, *(place.stop for place in places)]
    sources = documents.write(folder / split, stream.tables(), edges)
    written = [{**shard, "sources": _most(counts)} for shard, counts in zip(written, sources, strict=True)]
    facts: dict[str, Any] = {
        "tokens": len(stream),
        "flags": [*stream.flags(0, 0)],
        "cut_documents": stream.cut_documents(length),
        "tokenizer_sha256": tokenizers.digest(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        **stream.totals(),
        "sources": _most(sum(sources, Counter())),
    }
    if shards.LOSS in facts["flags"]:
        facts["counted"] = stream.counted
    if isinstance(stream, units.Packed):
        facts["padding"] = stream.padding
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
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_begin_worker) as pool:
        futures = {pool.submit(work, *item): size for item, size in zip(items, sizes, strict=True)}
        try:
            for future in concurrent.futures.as_completed(futures):
                progress.add(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _begin_worker() -> None:
    """Keep tokenizers from starting threads in worker processes, which end with this process."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    die_with_parent()


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


def _tokenizer(
    config: RunConfig, folder: Path, files: list[str], fields: readers.Fields, rule: holdout.Rule
) -> tokenizers.Tokenizer:
    """Copy the tokenizer of the configuration, or train a tokenizer on the text that is not held out."""
    folder.mkdir(parents=True, exist_ok=True)
    if config.tokenizer:
        tokenizer = _given_tokenizer(config)
        tokenizers.copy(tokenizer, folder)
        if not tokenizers.gives_back(tokenizer):
            log.warning("the tokenizer %s does not restore every text when decoding", tokenizer.path)
        return tokenizer
    path = folder / "tokenizer.model"
    if path.is_file():  # from an interrupted preparation with the same settings
        return tokenizers.load(path)
    return tokenizers.train(train_tokenizer.sample(files, fields, rule), path, config.data.vocab_size, config.seed)
