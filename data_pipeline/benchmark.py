"""Speed of preparing and streaming data on one core, compared with datasets, Megatron-Core and WebDataset."""

import importlib.metadata
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from armd_scale.benchmarks.process import resident, run_in_process

LENGTH = 1024
"""Number of tokens of a sample."""

SHARDS = 10_000
"""Number of shards in the start-up measurement."""


def measure(text: list[str], vocab: int, tokenizer: str | None) -> dict[str, Any]:
    """Print all comparisons on ``text`` and return them; ``tokenizer``: a Hugging Face tokenizer to measure too."""
    from armd_scale.data import readers
    from armd_scale.data import tokenizer as tokenizers
    from data_pipeline.train_tokenizer import sample

    facts: dict[str, Any] = {"versions": _versions(), "cpu": platform.processor() or platform.machine()}
    print("one core per measurement; " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    with tempfile.TemporaryDirectory() as folder:
        jsonl, size = Path(folder) / "text.jsonl", 0
        with jsonl.open("w", encoding="utf-8") as file:
            for document in readers.documents(text):
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                size += len(document.encode())
        trained = Path(folder) / "sentencepiece"
        trained.mkdir()
        tokenizers.train(sample([str(jsonl)]), trained / "tokenizer.model", vocab)
        names = {f"sentencepiece {vocab}": str(trained)} | ({"Hugging Face": tokenizer} if tokenizer else {})
        for name, path in names.items():
            print(f"\npreparing {size / 1e6:.1f} MB with {name}, from jsonl to packed tokens on disk")
            rows = {}
            for work in ("armd_scale", "datasets_map", "megatron"):
                out = f"{folder}/{work}-{Path(path).name}"
                seconds, tokens = run_in_process(
                    f"data_pipeline.benchmark.prepare_{work}", text=str(jsonl), tokenizer=path, out=out
                )
                rows[work] = {"seconds": seconds, "megabytes_per_second": size / seconds / 1e6, "tokens": tokens}
            _table(rows, "megabytes_per_second", "MB/s")
            facts[f"prepare {name}"] = rows
        prepared = f"{folder}/armd_scale-sentencepiece"
        print("\nstreaming one epoch of packed samples")
        rows = {}
        for work in ("armd_scale", "webdataset"):
            seconds, tokens = run_in_process(f"{__name__}.stream_{work}", folder=prepared)
            rows[work] = {"seconds": seconds, "megatokens_per_second": tokens / seconds / 1e6}
        _table(rows, "megatokens_per_second", "M tokens/s")
        facts["stream"] = rows
        start, resume, before, after = run_in_process(f"{__name__}.start_up", folder=f"{folder}/many")
        facts["start-up"] = {"open": start, "resume": resume, "rss_before": before, "rss_after": after}
        print(
            f"\n{SHARDS:,} shards: first batch after {start:.2f} s, resume at step 1,000,000 in {resume:.2f} s; "
            f"memory {before / 1e6:.0f} MB, {after / 1e6:.0f} MB after 20,000 samples"
        )
    return facts


def _versions() -> dict[str, str]:
    names = ("sentencepiece", "tokenizers", "datasets", "webdataset", "megatron-core", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _table(rows: dict[str, dict[str, float]], key: str, unit: str) -> None:
    first = next(iter(rows.values()))[key]
    for name, row in rows.items():
        ratio = "" if row[key] == first else f"   armd_scale is {first / row[key]:.2f} times as fast"
        print(f"  {name:<14} {row['seconds']:8.2f} s {row[key]:10.2f} {unit}{ratio}")


def prepare_armd_scale(text: str, tokenizer: str, out: str) -> tuple[float, int]:
    """Seconds and tokens of ``data_pipeline.prepare``."""
    from armd_scale.config import RunConfig
    from data_pipeline.prepare import prepare

    data = {"text": [text], "directory": out, "tokenizer": tokenizer, "workers": 1, "heldout_fraction": 0.01}
    config = RunConfig.model_validate({"model": {"length": LENGTH}, "data": data})
    started = time.perf_counter()
    index = prepare(config)
    return time.perf_counter() - started, index["tokens"]


def prepare_datasets_map(text: str, tokenizer: str, out: str) -> tuple[float, int]:
    """Hugging Face datasets: tokenise in batches, then concatenate and chunk, as in its language modelling examples."""
    import datasets

    from armd_scale.data import tokenizer as tokenizers

    datasets.disable_progress_bars()
    loaded = tokenizers.load(tokenizer)
    encode = _library_encoder(loaded)

    def tokenise(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": [[*ids, loaded.eos_id] for ids in encode(batch["text"])]}

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


def prepare_megatron(text: str, tokenizer: str, out: str) -> tuple[float, int]:
    """Megatron-Core: tokenise line by line into an indexed dataset, which is packed at training time."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from armd_scale.data import tokenizer as tokenizers

    loaded = tokenizers.load(tokenizer)
    encode, count = _library_encoder(loaded), 0
    started = time.perf_counter()
    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=DType.optimal_dtype(loaded.vocab_size))
    for line in _lines(text):
        ids = [*encode([json.loads(line)["text"]])[0], loaded.eos_id]
        builder.add_document(torch.from_numpy(np.array(ids, dtype=np.int64)), [len(ids)])
        count += len(ids)
    builder.finalize(f"{out}.idx")
    return time.perf_counter() - started, count


def _lines(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        yield from file


def _library_encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """The encode call of the tokenizer's own library."""
    if tokenizer.path.name == "tokenizer.json":
        import transformers

        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path))
        return lambda texts: fast(texts, add_special_tokens=False)["input_ids"]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    return lambda texts: processor.encode(texts)


def stream_armd_scale(folder: str) -> tuple[float, int]:
    """Seconds and tokens of one epoch of ``SampleStream``."""
    import numpy as np

    from armd_scale.data.shards import PackedDataset
    from armd_scale.data.stream import SampleStream

    started = time.perf_counter()
    data = PackedDataset(Path(folder) / "train")
    stream, total = SampleStream(len(data), 0), 0
    for first in range(0, len(data), 8):
        total += int(np.asarray(data.read(stream.take(first, min(8, len(data) - first)))).size)
    return time.perf_counter() - started, total


def stream_webdataset(folder: str) -> tuple[float, int]:
    """Seconds and tokens of one epoch of WebDataset over the same shards."""
    import webdataset

    from armd_scale.data.shards import PackedDataset

    index = PackedDataset(Path(folder) / "train").index
    names = [str(Path(folder) / "train" / shard["name"]) for shard in index["shards"]]
    started = time.perf_counter()
    dataset = webdataset.WebDataset(names, shardshuffle=False).shuffle(1000).decode().to_tuple("npy").batched(8)
    total = sum(batch[0].size for batch in dataset)
    return time.perf_counter() - started, total


def start_up(folder: str) -> tuple[float, float, int, int]:
    """Seconds to the first batch and to a batch after a resume; resident bytes before and after streaming."""
    import numpy as np

    from armd_scale.data import shards
    from armd_scale.data.shards import PackedDataset
    from armd_scale.data.stream import SampleStream

    Path(folder).mkdir()
    per_shard, tokens = 4, np.arange(4 * 64, dtype=np.uint16)
    layout = shards.cut(SHARDS * len(tokens), 64, per_shard)
    template = shards.write_shard(Path(folder), layout[0], tokens, 64)
    content = (Path(folder) / layout[0].name).read_bytes()
    for shard in layout[1:]:
        (Path(folder) / shard.name).write_bytes(content)
    written = [{**template, "name": shard.name} for shard in layout]
    shards.write_index(Path(folder), written, 64, {"tokens": SHARDS * len(tokens), "vocab_size": 1000, "bytes": 1})

    def first_batch(step: int) -> float:
        started = time.perf_counter()
        data = PackedDataset(folder)
        data.read(SampleStream(len(data), 0).take(step * 64, 64))
        return time.perf_counter() - started

    start, resume = first_batch(0), first_batch(1_000_000)
    data = PackedDataset(folder)
    stream = SampleStream(len(data), 0)
    before = resident()
    for step in range(20_000 // 64):
        data.read(stream.take(step * 64, 64))
    return start, resume, before, resident()
