"""How fast is this GPU? Training steps, decoding, attention kernels and profiles, beside their targets.

Runs the work of ``armd bench`` in the measurement's own process.
"""

import re
from collections.abc import Iterator
from typing import Any

from armd_scale.benchmarks import decode, train
from armd_scale.benchmarks.process import run_in_process
from armd_scale.benchmarks.registry import Context, Figure, measurement

SMALL = {"layers": 12, "hidden": 768, "length": 1024, "batch": 16}
LARGE = {"layers": 22, "hidden": 2048, "length": 2048, "batch": 8}
QUICK = {"layers": 2, "hidden": 64, "length": 64, "batch": 2}


@measurement("train-125m", worth=70, seconds=85, quick_seconds=15)
def train_125m(context: Context) -> Iterator[Figure]:
    """Step time and MFU at 125M parameters: AR, ARMD, ARMD strided, MDM, transformers' GPT-2"""
    rows: dict[str, dict[str, Any]] = {}
    kinds = {name: fields for name, fields in train.KINDS.items() if "documents" not in (fields or {})}
    for kind, row, figures in _steps(context, SMALL, kinds):
        rows[kind] = row
        yield from figures
        if kind == "ARMD":
            yield Figure("ARMD / AR step time, 125M", row["seconds"] / rows["AR"]["seconds"], "times", 1.20)
        if kind == "ARMD, strided, S = 4":
            ratio = row["seconds"] / rows["ARMD"]["seconds"]
            yield Figure("strided (S = 4) / plain step time, 125M", ratio, "times", 1.15)


@measurement("train-1b", worth=65, seconds=85, quick_seconds=15)
def train_1b(context: Context) -> Iterator[Figure]:
    """MFU of AR and ARMD at 1B parameters, and peak memory beside the plan"""
    kinds = {name: train.KINDS[name] for name in ("ARMD", "AR")}
    limits = {"ARMD": 0.50, "AR": 0.52}
    for kind, row, figures in _steps(context, LARGE, kinds, norm="rmsnorm", mlp="swiglu"):
        yield from figures
        yield Figure(f"MFU, 1B-class {kind}", row["mfu"], "of peak", limits[kind], ">=")
        if kind == "ARMD" and row["name"]:
            planned = run_in_process(
                "armd_scale.benchmarks.train.planned", sees_gpu=False, gpu=row["name"], **row["sizes"]
            )
            if planned:  # the plan knows this GPU
                yield Figure("peak memory over plan, 1B-class, off by", abs(row["memory"] / planned - 1), "", 0.10)


@measurement("decode-1", worth=60, seconds=40, quick_seconds=6)
def decode_1(context: Context) -> Iterator[Figure]:
    """Seconds of one text of 1,024 tokens, 125M parameters, batch 1, S = 1 and 4"""
    for streams, limit in ((1, 0.40), (4, 0.11)):
        row = _decode(context, 1, {"streams": streams})
        yield Figure(f"one text, batch 1, S = {streams}", row["seconds"], "s", limit, detail=row)


@measurement("decode-64", worth=55, seconds=90, quick_seconds=10)
def decode_64(context: Context) -> Iterator[Figure]:
    """Tokens a second at batch 64, 125M parameters, S = 4 and 1, beside transformers' GPT-2"""
    batch = 2 if context.quick else 64
    rates = {}
    for name, way in (("S = 4", {"streams": 4}), ("transformers GPT-2", None), ("S = 1", {"streams": 1})):
        row = _decode(context, batch, way)
        rates[name] = row["tokens_per_second"]
        yield Figure(f"tokens/s, batch 64, {name}", rates[name], "tokens/s", detail=row)
        if name == "transformers GPT-2":
            yield Figure("tokens/s, batch 64, S = 4 over GPT-2", rates["S = 4"] / rates[name], "times", 8.0, ">=")


@measurement("attention", worth=50, seconds=25, quick_seconds=5)
def attention_kernels(context: Context) -> Iterator[Figure]:
    """Milliseconds of attention, forward and backward, by every kernel that runs here"""
    import torch

    from armd_scale.model import attention

    place = torch.device(context.device, 0) if context.device == "cuda" else torch.device("cpu")
    for size in [QUICK] if context.quick else [SMALL, LARGE]:
        for streams in (1, 2):
            shape = (streams, size["batch"], size["hidden"] // 64, 1, size["length"], 64)
            for kernel in attention.KERNELS:
                table = attention.measure(shape, getattr(torch, context.dtype), place, kernels=[kernel])
                for seconds in table.values():
                    name = f"{kernel}, {streams} streams, {shape[1]} x {shape[2]} heads x {shape[4]}"
                    yield Figure(name, 1e3 * seconds, "ms", detail={"shape": shape})


@measurement("profile", worth=45, seconds=30, quick_seconds=8)
def profile_step(context: Context) -> Iterator[Figure]:
    """Where an ARMD step at 125M parameters spends its time; the trace goes into --trace"""
    for _, row, _ in _steps(context, SMALL, {"ARMD": train.KINDS["ARMD"]}, trace=True):
        for operation in row["profile"]:
            yield Figure(operation["name"][:56], 1e3 * operation["seconds"], "ms", detail=operation)


def _steps(
    context: Context, size: dict[str, int], kinds: dict[str, Any], trace: bool = False, **shape: str
) -> Iterator[tuple[str, dict[str, Any], list[Figure]]]:
    """Kind, measured row and its plain figures of training steps, one kind after the other."""
    size = QUICK if context.quick else size
    vocab, steps = (1000, 2) if context.quick else (50_257, 10)
    common = {**size, "vocab": vocab, "device": context.device, "dtype": context.dtype}
    own = {"norm": "layernorm", "mlp": "gelu", "recompute": "none", "fp8": False, "streams": 1, **shape}
    limit = train.matrix_products(context.device, context.dtype, threads=1)
    for kind, fields in kinds.items():
        train.free_memory(context.device)
        if fields is None:
            row = train.transformers(steps=steps, threads=1, **common)  # type: ignore[arg-type]
        else:
            path = None
            if trace:
                name = re.sub("[^A-Za-z0-9]+", "-", f"{kind}-{size['hidden']}-{size['batch']}x{size['length']}")
                path = f"{context.trace or context.shared}/{name}.json"
            sizes = {**common, **own, **fields}
            row = {**train.armd_scale(steps=steps, threads=1, trace=path, **sizes), "sizes": sizes}
        share = row["flops"] / row["seconds"]
        row |= {"mfu": share / (limit["peak"] or limit["flops"]), "name": limit["name"]}
        where = f"{kind}, {size['layers']} x {size['hidden']}"
        yield (
            kind,
            row,
            [
                Figure(f"{where}: a step", 1e3 * row["seconds"], "ms", detail=row),
                Figure(f"{where}: MFU", row["mfu"], "of peak"),
                Figure(f"{where}: peak memory", row["memory"] / 1e9, "GB"),
            ],
        )


def _decode(context: Context, batch: int, way: dict[str, int] | None) -> dict[str, float]:
    size = QUICK if context.quick else SMALL
    common = {name: size[name] for name in ("layers", "hidden", "length")}
    place = {"device": context.device, "dtype": context.dtype, "threads": 1}
    vocab = 1000 if context.quick else 50_257
    train.free_memory(context.device)
    if way is None:
        return decode.transformers(vocab=vocab, batch=batch, **common, **place)  # type: ignore[arg-type]
    return decode.armd_scale(vocab=vocab, batch=batch, way=way, **common, **place)  # type: ignore[arg-type]
