"""Speed of text generation, compared with transformers' GPT-2 of the same shape."""

import argparse
import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import Any

from armd_scale.benchmarks.process import run_in_process
from armd_scale.errors import UserError


def measure(args: argparse.Namespace) -> dict[str, Any]:
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
            work = f"{__name__}.transformers" if way is None else f"{__name__}.armd_scale"
            arguments: dict[str, Any] = common if way is None else {**common, "way": way}
            row = run_in_process(work, args.threads, **arguments)
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


def transformers(
    layers: int, hidden: int, vocab: int, length: int, batch: int, device: str, dtype: str, threads: int
) -> dict[str, float]:
    """GPT-2 with its cache and sampling, through the usual ``generate``."""
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

    return _timed(run, batch, length, device, warm_up=32)


def armd_scale(
    layers: int, hidden: int, vocab: int, length: int, batch: int, device: str, dtype: str, threads: int,
    way: dict[str, Any],
) -> dict[str, float]:  # fmt: skip
    import torch

    from armd_scale.inference import ARMD, FREE, ARMDConfig, Decoding

    torch.set_num_threads(threads)
    shape = ARMDConfig(
        vocab_size=vocab, bos_id=0, eos_id=0, layers=layers, hidden=hidden, heads=hidden // 64, kv_heads=hidden // 64,
        ffn=4 * hidden, length=length, two_stream_layers=max(1, layers // 2), norm="layernorm", mlp="gelu",
        tied_head=True, rope_base=10_000.0, norm_eps=1e-5, prefix_kernel="gaussian", prefix_width=3.0,
        prefix_dim=hidden, prefix_scale="none", prefix_target_position=False,
    )  # fmt: skip
    model = ARMD(shape).requires_grad_(False).eval()
    for name, weight in model.named_parameters():
        weight.fill_(1.0) if "norm" in name else weight.normal_(0, 0.02)
    model.to(device, getattr(torch, dtype))
    decoding = Decoding(**way)

    def run(count: int) -> int:
        return sum(1 for _ in model.decode(model.plan([[FREE] * count] * batch, decoding)))

    # A captured graph belongs to texts of one length.
    return _timed(run, batch, length, device, warm_up=32 if device == "cpu" else length)


def _timed(run: Callable[[int], int], batch: int, length: int, device: str, warm_up: int) -> dict[str, float]:
    """Figures of generating whole texts, after a warm-up of ``warm_up`` tokens."""
    import resource

    import torch

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    run(min(length, warm_up))
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
