"""Speed beside peers, in one run on this machine: prints a table, as ratios, and writes JSON.

python tools/bench.py data --text 'books/*.jsonl.zst' [--tokenizer gpt2] [--json bench.json]
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armd_scale.errors import UserError, cli
from armd_scale.files import write_atomically

LENGTH = 1024
"""Tokens in a sample."""
SHARDS = 10_000
"""Shards of the start-up measurement."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="preparing and streaming data, on one core")
    data.add_argument("--text", nargs="+", default=["builtin:python"], help="files, folders or globs of text")
    data.add_argument("--vocab", type=int, default=16_000, help="pieces of the sentencepiece model trained here")
    data.add_argument("--tokenizer", help="a Hugging Face tokenizer folder, measured as well")
    data.add_argument("--json", type=Path, help="write all figures to this file as well")
    one = commands.add_parser("_one")  # one measurement in a process of its own
    one.add_argument("work")
    one.add_argument("arguments")
    args = parser.parse_args()
    if args.command == "_one":
        print(json.dumps(_WORK[args.work](**json.loads(args.arguments))))
        return
    facts = _data(args.text, args.vocab, args.tokenizer)
    if args.json:
        write_atomically(args.json, json.dumps(facts, indent=1) + "\n")


def _data(text: list[str], vocab: int, tokenizer: str | None) -> dict[str, Any]:
    from armd_scale import tokenizer as tokenizers
    from data_pipeline import readers
    from data_pipeline.prepare import paragraphs

    for peer in ("datasets", "transformers"):
        if importlib.util.find_spec(peer) is None:
            raise UserError(f"{peer} is not installed: pip install -c constraints.txt -e '.[bench]'")
    facts: dict[str, Any] = {"versions": _versions(), "cpu": platform.processor() or platform.machine()}
    print("one core each; " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    with tempfile.TemporaryDirectory() as folder:
        jsonl, size = Path(folder) / "text.jsonl", 0
        with jsonl.open("w", encoding="utf-8") as file:
            for document in readers.documents(text):
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                size += len(document.encode())
        trained = Path(folder) / "sentencepiece"
        trained.mkdir()
        tokenizers.train(paragraphs(readers.documents([str(jsonl)])), trained / "tokenizer.model", vocab)
        names = {f"sentencepiece {vocab}": str(trained)} | ({"Hugging Face": tokenizer} if tokenizer else {})
        for name, path in names.items():
            print(f"\npreparing {size / 1e6:.1f} MB with {name}, from jsonl to packed tokens on disk")
            rows = {}
            for work in ("armd_scale", "datasets_map", "megatron"):
                out = f"{folder}/{work}-{Path(path).name}"
                seconds, tokens = _one(f"prepare_{work}", text=str(jsonl), tokenizer=path, out=out)
                rows[work] = {"seconds": seconds, "megabytes_per_second": size / seconds / 1e6, "tokens": tokens}
            _table(rows, "megabytes_per_second", "MB/s")
            facts[f"prepare {name}"] = rows
        prepared = f"{folder}/armd_scale-sentencepiece"
        print("\nstreaming the packed samples once")
        rows = {}
        for work in ("armd_scale", "webdataset"):
            seconds, tokens = _one(f"stream_{work}", folder=prepared)
            rows[work] = {"seconds": seconds, "megatokens_per_second": tokens / seconds / 1e6}
        _table(rows, "megatokens_per_second", "M tokens/s")
        facts["stream"] = rows
        start, resume, before, after = _one("start_up", folder=f"{folder}/many")
        facts["start-up"] = {"open": start, "resume": resume, "rss_before": before, "rss_after": after}
        print(
            f"\n{SHARDS:,} shards: first batch after {start:.2f} s, of step 1,000,000 after a restart {resume:.2f} s; "
            f"memory {before / 1e6:.0f} MB, after 20,000 samples {after / 1e6:.0f} MB"
        )
    return facts


def _versions() -> dict[str, str]:
    names = ("sentencepiece", "tokenizers", "datasets", "webdataset", "megatron-core", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _one(work: str, **arguments: Any) -> Any:
    """One measurement in a process that has one core and no other threads."""
    core = {min(os.sched_getaffinity(0))}
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, __file__, "_one", work, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )
    if done.returncode:
        raise UserError(f"the measurement {work} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _table(rows: dict[str, dict[str, float]], key: str, unit: str) -> None:
    first = next(iter(rows.values()))[key]
    for name, row in rows.items():
        ratio = "" if row[key] == first else f"   armd_scale is {first / row[key]:.2f} times as fast"
        print(f"  {name:<14} {row['seconds']:8.2f} s {row[key]:10.2f} {unit}{ratio}")


def _prepare_armd_scale(text: str, tokenizer: str, out: str) -> tuple[float, int]:
    from armd_scale.config import RunConfig
    from data_pipeline.prepare import prepare

    data = {"text": [text], "directory": out, "tokenizer": tokenizer, "workers": 1, "heldout_fraction": 0.01}
    config = RunConfig.model_validate({"model": {"length": LENGTH}, "data": data})
    started = time.perf_counter()
    index = prepare(config)
    return time.perf_counter() - started, index["tokens"]


def _prepare_datasets_map(text: str, tokenizer: str, out: str) -> tuple[float, int]:
    """Hugging Face's way: tokenise in batches, then concatenate and cut, as its language modelling examples do."""
    import datasets

    from armd_scale import tokenizer as tokenizers

    datasets.disable_progress_bars()
    one = tokenizers.load(tokenizer)
    encode = _usual_encoder(one)

    def tokenise(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": [[*ids, one.eos_id] for ids in encode(batch["text"])]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = [token for ids in batch["input_ids"] for token in ids]
        whole = len(joined) // LENGTH * LENGTH
        return {"input_ids": [joined[start : start + LENGTH] for start in range(0, whole, LENGTH)]}

    started = time.perf_counter()
    raw = datasets.load_dataset("json", data_files=text, split="train", cache_dir=f"{out}-cache")
    encoded = raw.map(tokenise, batched=True, batch_size=100, remove_columns=raw.column_names)
    grouped = encoded.map(group, batched=True, batch_size=100)
    grouped.save_to_disk(out)
    return time.perf_counter() - started, len(grouped) * LENGTH


def _prepare_megatron(text: str, tokenizer: str, out: str) -> tuple[float, int]:
    """Megatron's way: a line, a document, its tokens into an indexed dataset; packed when it is read."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from armd_scale import tokenizer as tokenizers

    one = tokenizers.load(tokenizer)
    encode, count = _usual_encoder(one), 0
    started = time.perf_counter()
    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=DType.optimal_dtype(one.vocab_size))
    for line in _lines(text):
        ids = [*encode([json.loads(line)["text"]])[0], one.eos_id]
        builder.add_document(torch.from_numpy(np.array(ids, dtype=np.int64)), [len(ids)])
        count += len(ids)
    builder.finalize(f"{out}.idx")
    return time.perf_counter() - started, count


def _lines(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        yield from file


def _usual_encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """The call that users of a tokenizer's own library make."""
    if tokenizer.path.name == "tokenizer.json":
        import transformers

        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path))
        return lambda texts: fast(texts, add_special_tokens=False)["input_ids"]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    return lambda texts: processor.encode(texts)


def _stream_armd_scale(folder: str) -> tuple[float, int]:
    import numpy as np

    from data_pipeline.shards import PackedDataset
    from data_pipeline.stream import SampleStream

    started = time.perf_counter()
    data = PackedDataset(Path(folder) / "train")
    stream, total = SampleStream(len(data), 0), 0
    for first in range(0, len(data), 8):
        total += int(np.asarray(data.read(stream.take(first, min(8, len(data) - first)))).size)
    return time.perf_counter() - started, total


def _stream_webdataset(folder: str) -> tuple[float, int]:
    import webdataset

    from data_pipeline.shards import PackedDataset

    index = PackedDataset(Path(folder) / "train").index
    names = [str(Path(folder) / "train" / shard["name"]) for shard in index["shards"]]
    started = time.perf_counter()
    dataset = webdataset.WebDataset(names, shardshuffle=False).shuffle(1000).decode().to_tuple("npy").batched(8)
    total = sum(batch[0].size for batch in dataset)
    return time.perf_counter() - started, total


def _start_up(folder: str) -> tuple[float, float, int, int]:
    import numpy as np

    from data_pipeline import shards
    from data_pipeline.shards import PackedDataset
    from data_pipeline.stream import SampleStream

    Path(folder).mkdir()
    per_shard, tokens = 4, np.arange(4 * 64, dtype=np.uint16)
    places = shards.cut(SHARDS * len(tokens), 64, per_shard)
    template = shards.write_shard(Path(folder), places[0], tokens, 64)
    content = (Path(folder) / places[0].name).read_bytes()
    for place in places[1:]:
        (Path(folder) / place.name).write_bytes(content)
    written = [{**template, "name": place.name} for place in places]
    shards.write_index(Path(folder), written, 64, {"tokens": SHARDS * len(tokens), "vocab_size": 1000, "bytes": 1})

    def first_batch(step: int) -> float:
        started = time.perf_counter()
        data = PackedDataset(folder)
        data.read(SampleStream(len(data), 0).take(step * 64, 64))
        return time.perf_counter() - started

    start, resume = first_batch(0), first_batch(1_000_000)
    data = PackedDataset(folder)
    stream = SampleStream(len(data), 0)
    before = _memory()
    for step in range(20_000 // 64):
        data.read(stream.take(step * 64, 64))
    return start, resume, before, _memory()


def _memory() -> int:
    """Bytes of this process that are not mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


_WORK: dict[str, Callable[..., Any]] = {
    "prepare_armd_scale": _prepare_armd_scale,
    "prepare_datasets_map": _prepare_datasets_map,
    "prepare_megatron": _prepare_megatron,
    "stream_armd_scale": _stream_armd_scale,
    "stream_webdataset": _stream_webdataset,
    "start_up": _start_up,
}

if __name__ == "__main__":
    cli(main)
