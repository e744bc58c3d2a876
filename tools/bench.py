"""Speed beside peers, in one run on this machine: prints a table, as ratios, and writes JSON.

python tools/bench.py data --text 'books/*.jsonl.zst' [--tokenizer gpt2] [--json bench.json]
python tools/bench.py decode [--layers 12 --hidden 768] [--batch 1 8 64] [--device cuda --dtype bfloat16]
python tools/bench.py train [--layers 12 --hidden 768] [--length 1024] [--batch 8] [--device cuda --dtype bfloat16]
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
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
from armd_scale.files import check_writable, write_atomically

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
    decode = commands.add_parser("decode", help="generating text, beside transformers' GPT-2 of the same shape")
    decode.add_argument("--layers", type=int, default=12)
    decode.add_argument("--hidden", type=int, default=768, help="width; heads have 64")
    decode.add_argument("--vocab", type=int, default=50_257)
    decode.add_argument("--length", type=int, default=LENGTH, help="tokens of a text")
    decode.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="texts at a time, one table each")
    decode.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    decode.add_argument("--draft", type=int, default=4, help="tokens drafted by exact parallel decoding; 0: leave out")
    decode.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on a CPU")
    decode.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    decode.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    decode.add_argument("--json", type=Path, help="write all figures to this file as well")
    train = commands.add_parser("train", help="a training step of each objective, beside transformers' GPT-2")
    train.add_argument("--layers", type=int, default=12)
    train.add_argument("--hidden", type=int, nargs="+", default=[768], help="width; heads have 64")
    train.add_argument("--vocab", type=int, default=50_257)
    train.add_argument("--length", type=int, nargs="+", default=[LENGTH], help="tokens of a text")
    train.add_argument("--batch", type=int, nargs="+", default=[8], help="texts of a step")
    train.add_argument("--steps", type=int, default=10, help="steps that are timed, after three that are not")
    train.add_argument("--norm", default="layernorm", choices=("layernorm", "rmsnorm"))
    train.add_argument("--mlp", default="gelu", choices=("gelu", "swiglu"))
    train.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    train.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on a CPU")
    train.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    train.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    train.add_argument("--fp8", action="store_true", help="layers in FP8, see train.fp8")
    train.add_argument("--trace", type=Path, help="folder for a profile of one more step of each kind")
    train.add_argument("--plot", type=Path, help="picture of how cost grows along the size that has several values")
    train.add_argument("--json", type=Path, help="write all figures to this file as well")
    one = commands.add_parser("_one")  # one measurement in a process of its own
    one.add_argument("work")
    one.add_argument("arguments")
    args = parser.parse_args()
    if args.command == "_one":
        print(json.dumps(_WORK[args.work](**json.loads(args.arguments))))
        return
    for peer in ("datasets", "transformers"):
        if importlib.util.find_spec(peer) is None:
            raise UserError(f"{peer} is not installed: pip install -c constraints.txt -e '.[bench]'")
    for path in (args.json, getattr(args, "plot", None)):
        if path:
            check_writable(path)
    if args.command == "decode":
        facts = _decode(args)
    elif args.command == "train":
        facts = _train(args)
    else:
        facts = _data(args.text, args.vocab, args.tokenizer)
    if args.json:
        write_atomically(args.json, json.dumps(facts, indent=1) + "\n")


def _data(text: list[str], vocab: int, tokenizer: str | None) -> dict[str, Any]:
    from armd_scale import tokenizer as tokenizers
    from data_pipeline import readers
    from data_pipeline.prepare import paragraphs

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


def _decode(args: argparse.Namespace) -> dict[str, Any]:
    if args.hidden % 64 or min(args.layers, args.length, *args.batch, *args.streams) < 1:
        raise UserError("--hidden must be a multiple of 64, the other sizes at least 1")
    shape = {"layers": args.layers, "hidden": args.hidden, "vocab": args.vocab, "length": args.length}
    place = {"device": args.device, "dtype": args.dtype}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    facts: dict[str, Any] = {
        "shape": shape,
        **place,
        "threads": args.threads,
        "versions": versions,
        "cpu": platform.processor(),
    }
    print(
        f"{args.layers} layers x {args.hidden}, vocabulary {args.vocab:,}, texts of {args.length} tokens, random "
        f"weights, temperature 1; {args.dtype} on {args.device}, {args.threads} threads; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    ways = [(f"armd_scale S = {s}", {"streams": s}) for s in args.streams]
    if args.draft:
        ways.append((f"armd_scale exact, {args.draft}", {"draft": args.draft}))
    for batch in args.batch:
        columns = f"{'tokens/s':>10}{'passes':>8}{'ms a pass':>11}{'memory':>10}{'GPT-2':>9}{'S = 1':>9}"
        print(f"\nbatch {batch}\n  {'':<22}{columns}")
        common = {**shape, **place, "batch": batch}
        rows: dict[str, dict[str, float]] = {}
        for name, way in [("transformers GPT-2", None), *ways]:
            work = "decode_transformers" if way is None else "decode_armd_scale"
            row = _one(work, args.threads, **common, **({} if way is None else {"way": way}))
            rows[name] = row
            rate, peer = row["tokens_per_second"], rows["transformers GPT-2"]["tokens_per_second"]
            first = next((r["tokens_per_second"] for n, r in rows.items() if n == ways[0][0]), None)
            print(
                f"  {name:<22}{rate:>10.1f}{row['passes']:>8}{1000 * row['seconds'] / row['passes']:>11.2f}"
                f"{row['memory'] / 1e9:>7.2f} GB{rate / peer:>8.2f}x" + (f"{rate / first:>8.2f}x" if first else ""),
                flush=True,
            )
        facts[f"batch {batch}"] = rows
    return facts


def _decode_transformers(
    layers: int, hidden: int, vocab: int, length: int, batch: int, device: str, dtype: str, threads: int
) -> dict[str, float]:
    """GPT-2 with its cache, sampled, as its users call it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(threads)
    config = GPT2Config(
        n_layer=layers, n_embd=hidden, n_head=hidden // 64, vocab_size=vocab, n_positions=length + 1,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().to(device, getattr(torch, dtype))
    prompt = torch.zeros(batch, 1, dtype=torch.long, device=device)

    def run(count: int) -> int:
        model.generate(prompt, max_new_tokens=count, do_sample=True, top_k=0, use_cache=True, pad_token_id=0)
        return count

    return _timed(run, batch, length, device)


def _decode_armd_scale(
    layers: int, hidden: int, vocab: int, length: int, batch: int, device: str, dtype: str, threads: int,
    way: dict[str, int],
) -> dict[str, float]:  # fmt: skip
    import torch

    from armd_scale.inference import ARMD, FREE, ARMDConfig, Decoding

    torch.set_num_threads(threads)
    shape = ARMDConfig(
        vocab_size=vocab, bos_id=0, eos_id=0, layers=layers, hidden=hidden, heads=hidden // 64, kv_heads=hidden // 64,
        ffn=4 * hidden, length=length, two_stream_layers=layers // 2, norm="layernorm", mlp="gelu", tied_head=True,
        rope_base=10_000.0, norm_eps=1e-5, prefix_kernel="gaussian", prefix_width=3.0, prefix_dim=hidden,
        prefix_scale="none", prefix_target_position=False,
    )  # fmt: skip
    model = ARMD(shape).requires_grad_(False).eval()
    for name, weight in model.named_parameters():
        weight.fill_(1.0) if "norm" in name else weight.normal_(0, 0.02)
    model.to(device, getattr(torch, dtype))
    decoding = Decoding(**way)

    def run(count: int) -> int:
        return sum(1 for _ in model.decode(model.plan([[FREE] * count] * batch, decoding)))

    return _timed(run, batch, length, device)


KINDS: dict[str, dict[str, Any] | None] = {
    "AR": {"objective": "ar"},
    "ARMD": {"objective": "armd"},
    "ARMD, strided, S = 4": {"objective": "armd", "streams": 4},
    "MDM": {"objective": "mdm"},
    "transformers GPT-2": None,
}
"""Training steps that are measured; ratios are to AR on this stack."""


def _train(args: argparse.Namespace) -> dict[str, Any]:
    sizes = {"hidden": args.hidden, "length": args.length, "batch": args.batch}
    varied = [name for name, values in sizes.items() if len(values) > 1]
    if len(varied) > 1 or (args.plot and not varied):
        raise UserError("give several values of one of --hidden, --length and --batch; --plot needs them")
    if args.trace:
        args.trace.mkdir(parents=True, exist_ok=True)
    if any(hidden % 64 for hidden in args.hidden) or min(args.layers, args.steps, *args.length, *args.batch) < 1:
        raise UserError("--hidden must be a multiple of 64, the other sizes at least 1")
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed", "megatron-core")
    }
    limit = _one("matrix_products", args.threads, device=args.device, dtype=args.dtype)
    facts: dict[str, Any] = {"versions": versions, "cpu": platform.processor(), "limit": limit, "rows": []}
    facts |= {name: getattr(args, name) for name in ("layers", "vocab", "device", "dtype", "threads", "norm", "mlp")}
    print(
        f"{args.layers} layers, vocabulary {args.vocab:,}; {args.dtype} on {args.device}"
        + (f", {args.threads} threads" if args.device == "cpu" else f" ({limit['name']})")
        + f"; a large matrix product here: {limit['flops'] / 1e12:.2f} TFLOP/s; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    for number in range(max(map(len, sizes.values()))):
        size = {name: values[min(number, len(values) - 1)] for name, values in sizes.items()}
        columns = f"{'ms a step':>11}{'tokens/s':>12}{'to AR':>8}{'of limit':>10}{'MFU':>8}{'memory':>12}{'plan':>8}"
        print(f"\nhidden {size['hidden']}, {size['batch']} texts of {size['length']} tokens\n  {'':<22}{columns}")
        common = {"layers": args.layers, "vocab": args.vocab, "steps": args.steps, **size}
        common |= {"device": args.device, "dtype": args.dtype}
        own = {"norm": args.norm, "mlp": args.mlp, "recompute": args.recompute, "fp8": args.fp8}
        left_to_right = 0.0
        for name, kind in KINDS.items():
            if kind is None:
                row = _one("train_transformers", args.threads, **common)
            else:
                words = [name, f"hidden {size['hidden']}", f"{size['batch']} x {size['length']}"]
                trace = str(args.trace / f"{', '.join(words)}.json") if args.trace else None
                row = _one("train_armd_scale", args.threads, **common, **own, **kind, trace=trace)
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


def _matrix_products(device: str, dtype: str, threads: int) -> dict[str, Any]:
    """The rate of large matrix products, the limit of a training step; the data sheet's peak where it is known."""
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


def _train_armd_scale(
    objective: str, layers: int, hidden: int, vocab: int, length: int, batch: int, steps: int, device: str, dtype: str,
    threads: int, norm: str, mlp: str, recompute: str, fp8: bool, trace: str | None, streams: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Whole steps of the training loop's engine: forward, backward, ZeRO-1 update with moving average."""
    import numpy as np
    import torch

    from armd_scale.config import RunConfig
    from armd_scale.model.flops import training_flops_per_token
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine
    from armd_scale.training import kernels, objectives

    torch.set_num_threads(threads)
    cuda = device != "cpu"
    model = {"layers": layers, "hidden": hidden, "heads": hidden // 64, "length": length, "norm": norm, "mlp": mlp}
    config = RunConfig.model_validate(
        {
            "objective": objective,
            "model": {**model, "vocab_size": vocab, "bos_id": 0},
            "orders": {
                "ar_steps": 0, "permutation_steps": 0, "rho": min(32, length), "strided_steps": 1000 * (streams > 1),
                "streams": [streams],
            },
            "train": {"steps": 1000, "global_batch": batch, "micro_batch": batch, "dtype": dtype, "fp8": fp8},
            "parallel": {"recompute": recompute},
            "cluster": {"gpus_per_node": int(cuda)},
        }
    )  # fmt: skip
    place = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high" if dtype == "bfloat16" else "highest")
    with tempfile.TemporaryDirectory() as folder:
        groups.start(config.parallel, rank=0, processes=1, rendezvous=f"{folder}/store", device=place)
        kernels.check_fp8(config, place)
        engine = Engine(config, place, kernels.attention_kernel(config.model_copy(update={"run_dir": folder}), place))
        tokens = np.random.default_rng(0).integers(0, vocab, (batch, length))
        first = 1000 if streams > 1 else 0
        rows = engine.upload([objectives.training_rows(config, tokens, first, range(batch))])
        seconds = _step_seconds(lambda: engine.train_step(rows, 1e-4), steps, device)
        profile = _profile(lambda: engine.train_step(rows, 1e-4).result(), cuda, trace) if trace else []
        groups.stop()
    memory, planned = _memory(), 0.0
    if cuda:
        from armd_scale.planning.hardware import find
        from armd_scale.planning.plan import Planner

        memory = torch.cuda.max_memory_allocated()
        planned = Planner(find("h200" if "H200" in torch.cuda.get_device_name() else "h100")).plan(config).peak.total
    flops = training_flops_per_token(config.model) * batch * length
    return {"seconds": seconds, "flops": flops, "memory": memory, "planned": planned, "profile": profile}


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


def _train_transformers(
    layers: int, hidden: int, vocab: int, length: int, batch: int, steps: int, device: str, dtype: str, threads: int
) -> dict[str, Any]:
    """GPT-2 as its users train it: float32 weights, bfloat16 by autocast, PyTorch's AdamW."""
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
    memory = _memory() if device == "cpu" else torch.cuda.max_memory_allocated()
    macs = layers * (12 * hidden**2 + length * hidden) + vocab * hidden
    return {
        "seconds": seconds, "flops": 6 * macs * batch * length, "memory": memory, "planned": 0.0,
    }  # fmt: skip


def _timed(run: Callable[[int], int], batch: int, length: int, device: str) -> dict[str, float]:
    """Figures of one run over whole texts, after a short one that warms up."""
    import resource

    import torch

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    run(min(length, 32) if device == "cpu" else length)
    wait()
    started = time.perf_counter()
    passes = run(length)
    wait()
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device != "cpu":
        memory = torch.cuda.max_memory_allocated()
    rate = batch * length / seconds
    return {"seconds": seconds, "passes": passes, "tokens_per_second": rate, "memory": memory}


def _one(work: str, threads: int = 1, **arguments: Any) -> Any:
    """One measurement in a process of its own, on as many cores as it has threads."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": str(threads)}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if work.startswith(("decode", "train", "matrix")):
        arguments["threads"] = threads
    done = subprocess.run(
        [sys.executable, __file__, "_one", work, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
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
    "decode_transformers": _decode_transformers,
    "decode_armd_scale": _decode_armd_scale,
    "matrix_products": _matrix_products,
    "train_armd_scale": _train_armd_scale,
    "train_transformers": _train_transformers,
}

if __name__ == "__main__":
    cli(main)
