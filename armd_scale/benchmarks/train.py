"""Speed of training steps of each objective, compared with transformers' GPT-2 of the same shape."""

import argparse
import importlib.metadata
import itertools
import platform
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

from armd_scale.benchmarks.process import resident, run_in_process
from armd_scale.errors import UserError

KINDS: dict[str, dict[str, Any] | None] = {
    "AR": {"objective": "ar"},
    "ARMD": {"objective": "armd"},
    "ARMD, strided, S = 4": {"objective": "armd", "streams": 4},
    "ARMD, 8 documents": {"objective": "armd", "documents": 8},
    "ARMD, 64 documents": {"objective": "armd", "documents": 64},
    "MDM": {"objective": "mdm"},
    "transformers GPT-2": None,
}
"""Training steps that are measured; ratios are to AR on this stack."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    sizes = {"hidden": args.hidden, "length": args.length, "batch": args.batch}
    varied = [name for name, values in sizes.items() if len(values) > 1]
    if len(varied) > 1 or (args.plot and not varied):
        raise UserError("give several values of one of --hidden, --length and --batch; --plot needs them")
    if args.trace:
        args.trace.mkdir(parents=True, exist_ok=True)
    if any(hidden % 64 for hidden in args.hidden) or min(args.layers, args.steps, *args.length, *args.batch) < 1:
        raise UserError("--hidden must be a multiple of 64, the other sizes at least 1")
    places = [
        {name: values[min(number, len(values) - 1)] for name, values in sizes.items()}
        for number in range(max(map(len, sizes.values())))
    ]
    common = {"layers": args.layers, "vocab": args.vocab, "device": args.device, "dtype": args.dtype}
    own = {"norm": args.norm, "mlp": args.mlp, "recompute": args.recompute, "fp8": args.fp8, "streams": 1}
    for size in places:
        for fields in filter(None, KINDS.values()):
            _configuration(**{**common, **own, **size, **fields})
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed", "megatron-core")
    }
    limit = run_in_process(f"{__name__}.matrix_products", args.threads, device=args.device, dtype=args.dtype)
    facts: dict[str, Any] = {"versions": versions, "cpu": platform.processor(), "limit": limit, "rows": []}
    facts |= {name: getattr(args, name) for name in ("layers", "vocab", "device", "dtype", "threads", "norm", "mlp")}
    print(
        f"{args.layers} layers, vocabulary {args.vocab:,}; {args.dtype} on {args.device}"
        + (f", {args.threads} threads" if args.device == "cpu" else f" ({limit['name']})")
        + f"; a large matrix product here: {limit['flops'] / 1e12:.2f} TFLOP/s; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    for size in places:
        columns = f"{'ms a step':>11}{'tokens/s':>12}{'to AR':>8}{'of limit':>10}{'MFU':>8}{'memory':>12}{'plan':>8}"
        print(f"\nhidden {size['hidden']}, {size['batch']} texts of {size['length']} tokens\n  {'':<22}{columns}")
        left_to_right = 0.0
        for name, kind in KINDS.items():
            if kind is None:
                row = {
                    **run_in_process(f"{__name__}.transformers", args.threads, steps=args.steps, **common, **size),
                    "planned": 0.0,
                }
            else:
                words = f"{name} hidden {size['hidden']} {size['batch']}x{size['length']}"
                trace = str(args.trace / f"{re.sub('[^A-Za-z0-9]+', '-', words)}.json") if args.trace else None
                run = {**common, **own, **size, **kind}
                row = run_in_process(f"{__name__}.armd_scale", args.threads, steps=args.steps, trace=trace, **run)
                gpu = limit["name"]
                row["planned"] = run_in_process(f"{__name__}.planned", sees_gpu=False, gpu=gpu, **run) if gpu else 0.0
            left_to_right = left_to_right or row["seconds"]  # AR comes first
            row |= {"kind": name, **size, "ratio": row["seconds"] / left_to_right}
            facts["rows"].append(row)
            profile = row.get("profile", [])
            share = row["flops"] / row["seconds"]
            mfu = f"{share / limit['peak']:>8.1%}" if limit["peak"] else f"{'':>8}"
            plan = f"{row['planned'] / row['memory']:>8.2f}" if row["planned"] else ""
            print(
                f"  {name:<22}{1e3 * row['seconds']:>11.1f}{size['batch'] * size['length'] / row['seconds']:>12,.0f}"
                f"{row['ratio']:>8.2f}{share / limit['flops']:>10.1%}{mfu}{row['memory'] / 1e9:>9.2f} GB{plan}",
                flush=True,
            )
            for operation in profile:
                print(f"    {operation['name']:<60.60}{operation['count']:>6}{1e3 * operation['seconds']:>10.2f} ms")
    if args.plot:
        from armd_scale.planning.report import draw_growth

        title = {"hidden": "width", "length": "tokens of a text", "batch": "texts of a step"}[varied[0]]
        draw_growth([{**row, "place": row[varied[0]]} for row in facts["rows"]], title, args.plot)
    return facts


def matrix_products(device: str, dtype: str, threads: int) -> dict[str, Any]:
    """The rate of large matrix products, which limits a training step: the data sheet's peak if known."""
    import torch

    from armd_scale.model.flops import peak_flops

    torch.set_num_threads(threads)
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    seconds = _step_seconds(lambda: a @ b, 10, device)
    name = "" if device == "cpu" else torch.cuda.get_device_name(device)
    return {"flops": 2 * size**3 / seconds, "name": name, "peak": peak_flops(name) if name else None}


def _step_seconds(step: Callable[[], Any], count: int, device: str) -> float:
    """Median seconds of ``count`` steps, after three that warm up. A GPU is not waited for between them: what counts is
    the time from the end of one step to the end of the next.
    """
    import torch

    if device == "cpu":
        times = []
        for _ in range(3 + count):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        return sorted(times[3:])[count // 2]
    events = []
    for _ in range(3 + count):
        step()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events[2:]))
    return times[count // 2]


def free_memory(device: str) -> None:
    """Free the memory of the previous measurement and reset the peaks."""
    import gc

    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def armd_scale(steps: int, threads: int, trace: str | None, **sizes: Any) -> dict[str, Any]:
    """Whole steps of the training loop's engine: forward, backward, ZeRO-1 update with moving average."""
    import numpy as np
    import torch

    from armd_scale import packing
    from armd_scale.model.flops import training_flops_per_token
    from armd_scale.objectives.interface import training
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine
    from armd_scale.training import kernels

    torch.set_num_threads(threads)
    config = _configuration(**sizes)
    device, dtype, vocab = sizes["device"], sizes["dtype"], sizes["vocab"]
    batch, length = config.train.global_batch, config.model.length
    cuda = device != "cpu"
    place = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high" if dtype == "bfloat16" else "highest")
    with tempfile.TemporaryDirectory() as folder:
        groups.start(config.parallel, rank=0, processes=1, rendezvous=f"{folder}/store", device=place)
        kernels.check_fp8(config, place)
        engine = Engine(config, place, kernels.attention_kernel(config.model_copy(update={"run_dir": folder}), place))
        tokens = np.random.default_rng(0).integers(0, vocab, (batch, length))
        first = 1000 if sizes["streams"] > 1 else 0
        number = np.arange(length) * sizes.get("documents", 1) // length
        starts = np.tile(packing.starts(np.diff(number, prepend=-1) > 0), (batch, 1))
        rows = engine.upload([training(config.objective).rows(config, tokens, first, range(batch), starts)])
        seconds = _step_seconds(lambda: engine.train_step(rows, 1e-4), steps, device)
        profile = _profile(lambda: engine.train_step(rows, 1e-4).result(), cuda, trace) if trace else []
        groups.stop()
    memory = torch.cuda.max_memory_allocated() if cuda else resident()
    flops = training_flops_per_token(config.model) * batch * length
    return {"seconds": seconds, "flops": flops, "memory": memory, "profile": profile}


def _configuration(
    objective: str, layers: int, hidden: int, vocab: int, length: int, batch: int, device: str, dtype: str, norm: str,
    mlp: str, recompute: str, fp8: bool, streams: int, documents: int = 1,
) -> Any:  # fmt: skip
    """The run configuration of a measured step; ``UserError`` for sizes that are not valid."""
    from pydantic import ValidationError

    from armd_scale.config import RunConfig

    model = {"layers": layers, "hidden": hidden, "heads": hidden // 64, "length": length, "norm": norm, "mlp": mlp}
    try:
        return RunConfig.model_validate(
            {
                "objective": objective,
                "model": {**model, "vocab_size": vocab, "bos_id": 0},
                "orders": {
                    "ar_steps": 0, "permutation_steps": 0, "rho": min(32, length),
                    "strided_steps": 1000 * (streams > 1), "streams": [streams],
                },
                "train": {"steps": 1000, "global_batch": batch, "micro_batch": batch, "dtype": dtype, "fp8": fp8},
                "data": {"documents": "separate" if documents > 1 else "joined"},
                "parallel": {"recompute": recompute},
                "cluster": {"gpus_per_node": int(device != "cpu")},
            }
        )  # fmt: skip
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def planned(gpu: str, threads: int, **sizes: Any) -> float:
    """Peak memory by plan, in bytes, 0 for a GPU that is not known by this name; for a process that sees no GPU, since
    the tensors of a plan are fake ones of the CPU.
    """
    from armd_scale.planning.hardware import GPUS
    from armd_scale.planning.plan import Planner

    found = next((known for name, known in GPUS.items() if name.upper() in gpu), None)
    return Planner(found).plan(_configuration(**sizes)).peak.total if found else 0.0


def _profile(step: Callable[[], Any], cuda: bool, path: str) -> list[dict[str, Any]]:
    """The operations that take longest of one step, by their own time; the whole trace goes to ``path``."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        step()
    found.export_chrome_trace(path)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [
        {"name": one.key, "count": one.count, "seconds": getattr(one, own) / 1e6}
        for one in found.key_averages()
        if not (cuda and one.device_type.name == "CPU")
    ]
    return sorted(rows, key=lambda row: -row["seconds"])[:15]


def transformers(
    layers: int, hidden: int, vocab: int, length: int, batch: int, steps: int, device: str, dtype: str, threads: int
) -> dict[str, Any]:
    """GPT-2 in the usual training setup: float32 weights, bfloat16 autocast, PyTorch's AdamW."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(threads)
    config = GPT2Config(
        n_layer=layers, n_embd=hidden, n_head=hidden // 64, vocab_size=vocab, n_positions=length,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device != "cpu")
    tokens = torch.randint(vocab, (batch, length), device=device)

    def step() -> None:
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = _step_seconds(step, steps, device)
    memory = resident() if device == "cpu" else torch.cuda.max_memory_allocated()
    macs = layers * (12 * hidden**2 + length * hidden) + vocab * hidden
    return {"seconds": seconds, "flops": 6 * macs * batch * length, "memory": memory}
