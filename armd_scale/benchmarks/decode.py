"""Speed of text generation, compared with transformers' GPT-2 of the same shape."""

import argparse
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

from armd_scale.benchmarks.process import run_in_process
from armd_scale.errors import UserError


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.hidden % 64 or min(args.layers, args.length, *args.batch, *args.streams, *args.prompt) < 1:
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
    if args.prompt:
        facts["prompts"] = _prompts(args.prompt, args.threads, {**shape, **place})
    return facts


def _prompts(lengths: Sequence[int], threads: int, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Time and memory of reading a prompt and writing one token, by the length of the prompt."""
    print(f"\na prompt, and one token\n  {'':<22}{'tokens':>10}{'seconds':>10}{'tokens/s':>10}{'memory':>10}")
    rows = []
    for length in lengths:
        for name, work in (("transformers GPT-2", "transformers"), ("armd_scale", "armd_scale")):
            arguments: dict[str, Any] = {**shape, "length": length, "batch": 1, "prompt": True}
            more: dict[str, Any] = {"way": {}} if work == "armd_scale" else {}
            row = run_in_process(f"{__name__}.{work}", threads, **arguments, **more)
            rows.append({"name": name, "tokens": length, **row})
            print(
                f"  {name:<22}{length:>10,}{row['seconds']:>10.2f}{length / row['seconds']:>10.0f}"
                f"{row['memory'] / 1e9:>7.2f} GB",
                flush=True,
            )
    return rows


def transformers(
    layers: int, hidden: int, vocab: int, length: int, batch: int, device: str, dtype: str, threads: int,
    prompt: bool = False,
) -> dict[str, float]:  # fmt: skip
    """GPT-2 with its cache and sampling, through the usual ``generate``.

    ``prompt``: reads ``length`` tokens and writes one, instead of writing ``length``.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(threads)
    config = GPT2Config(
        n_layer=layers, n_embd=hidden, n_head=hidden // 64, vocab_size=vocab, n_positions=length + 2,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().to(device, getattr(torch, dtype))

    def run(count: int) -> int:
        given = torch.zeros(batch, count if prompt else 1, dtype=torch.long, device=device)
        wanted = 1 if prompt else count
        model.generate(given, max_new_tokens=wanted, do_sample=True, top_k=0, use_cache=True, pad_token_id=0)
        return wanted

    return _timed(run, batch, length, device, warm_up=32)


def armd_scale(
    layers: int, hidden: int, vocab: int, length: int, batch: int, device: str, dtype: str, threads: int,
    way: dict[str, Any], prompt: bool = False,
) -> dict[str, float]:  # fmt: skip
    """A model with the default seed, by the decoding ``way``; ``prompt`` as for ``transformers``."""
    import torch

    from armd_scale.inference import ARMD, FREE, ARMDConfig, Decoding

    torch.set_num_threads(threads)
    shape = ARMDConfig(
        vocab_size=vocab, bos_id=0, eos_id=0, layers=layers, hidden=hidden, heads=hidden // 64, kv_heads=hidden // 64,
        ffn=4 * hidden, length=length + 1, two_stream_layers=max(1, layers // 2), norm="layernorm", mlp="gelu",
        tied_head=True, rope_base=10_000.0, norm_eps=1e-5, prefix_kernel="gaussian", prefix_width=[1.0, 3.0, 8.0],
        prefix_dim=hidden, prefix_scale="none", prefix_target_position=False, prefix_gate=True, prefix_neighbour=True,
        prefix_place="before",
    )  # fmt: skip
    model = ARMD(shape).requires_grad_(False).eval()
    for name, weight in model.named_parameters():
        weight.fill_(1.0) if "norm" in name else weight.normal_(0, 0.02)
    model.to(device, getattr(torch, dtype))
    decoding = Decoding(**way)

    def run(count: int) -> int:
        text = [0] * count + [FREE] if prompt else [FREE] * count
        return sum(1 for _ in model.decode(model.plan([text] * batch, decoding)))

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
