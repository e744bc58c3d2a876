"""Generate text with a standalone model; on a terminal it appears in the order in which it is generated.

    python tools/generate.py MODEL_DIR --prompt "..." --streams 4
    python tools/generate.py MODEL_DIR --infill "The quick ___:2 jumps over the ___ dog"

``--infill`` fills gaps: ``___`` stands for one token, ``___:N`` for N tokens.
"""

import argparse
import itertools
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armd_scale.errors import UserError, cli

HOLE = "\u2591"
GAP = re.compile(r"_{3,}(?::(\d{1,6}))?")


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate text with a standalone model")
    parser.add_argument("model", type=Path, help="model folder, as made by tools/convert_ckpt.py")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="", help="text to go on from")
    source.add_argument("--infill", metavar="TEXT", help="text with gaps: ___ is one token, ___:N are N tokens")
    parser.add_argument("--length", type=int, help="tokens of the text, prompt included (default: the model's length)")
    parser.add_argument("--order", choices=("left-to-right", "random"), default="left-to-right", help="of the gaps")
    parser.add_argument("--streams", type=int, default=1, help="tokens generated a step (default 1)")
    parser.add_argument("--draft", type=int, default=0, help="exact parallel decoding: tokens drafted at a time")
    parser.add_argument("--steps", type=int, default=0, help="of masked diffusion (default: as many as tokens)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="only the likeliest tokens of this probability")
    parser.add_argument("--min-p", type=float, default=0.0, help="only tokens this probable beside the likeliest")
    parser.add_argument("--stop", action="store_true", help="end at the first end-of-text token")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")
    args = parser.parse_args()

    import torch
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from armd_scale import inference
    from armd_scale.data import tokenizer as tokenizers
    from armd_scale.data.readers import encodable

    model = inference.load(args.model, args.device, getattr(torch, args.dtype) if args.dtype else None)
    tokenizer = tokenizers.load(args.model, model.config.vocab_size)
    if not encodable(args.infill or args.prompt):
        raise UserError("the prompt is not UTF-8 text: check the encoding of the terminal")
    decoding = inference.Decoding(
        args.streams, args.draft, args.temperature, args.top_k, args.top_p, args.min_p, args.steps, args.stop
    )
    longest = model.config.length
    if args.infill is None:
        text, length = tokenizer.encode(args.prompt), args.length if args.length is not None else longest
        if len(text) > length or length > longest:
            raise UserError(
                f"the prompt has {len(text)} tokens and the text {length}, but this model takes up to {longest}: "
                "shorten the prompt or change --length"
            )
        text += [inference.FREE] * (length - len(text))
    else:
        text = gapped(args.infill, tokenizer.encode, inference.FREE)
    free = [position for position, token in enumerate(text, start=1) if token == inference.FREE]
    order = None
    if args.order == "random":
        shuffled = torch.randperm(len(free), generator=torch.Generator().manual_seed(args.seed % 2**63))
        order = [free[place] for place in shuffled.tolist()]
    [task] = model.plan([text], decoding, args.seed, order)
    frontier = inference.Frontier(task, model.config.eos_id)
    console = Console()
    count, made, started = 0, 0, time.perf_counter()
    with Live(console=console, auto_refresh=False) if console.is_terminal else _Silent() as screen:
        for step in model.decode([task]):
            frontier.push(step.positions[0].tolist(), step.tokens[0].tolist())
            count += 1
            made += int((step.positions > 0).sum())
            screen.update(Text(render(shown(frontier, inference.FREE), tokenizer.decode)), refresh=True)
    seconds = time.perf_counter() - started
    if not console.is_terminal:
        print(render(shown(frontier, inference.FREE), tokenizer.decode))
    print(
        f"\n{made} tokens in {count} forward passes ({made / max(count, 1):.2f} a pass), {seconds:.2f} s, "
        f"{made / max(seconds, 1e-9):.0f} tokens/s "
        f"({task.decoding.strategy}, streams {args.streams}, seed {args.seed}, temperature {args.temperature:g})",
        file=sys.stderr,
    )


def gapped(text: str, encode, free: int) -> list[int]:  # type: ignore[no-untyped-def]
    """Tokens of a text with gaps, ``free`` for each token of a gap. ``UserError`` when it has none."""
    tokens: list[int] = []
    at = 0
    for gap in GAP.finditer(text):
        tokens += [*encode(text[at : gap.start()]), *[free] * int(gap[1] or 1)]
        at = gap.end()
    if free not in tokens:
        raise UserError("--infill has no gap: write ___ for one token, ___:5 for five")
    return tokens + list(encode(text[at:]))


def shown(frontier, free: int) -> list[int | None]:  # type: ignore[no-untyped-def]
    """Tokens to show, None where there is none yet; nothing behind the end of the text."""
    tokens = [None if token == free else token for token in frontier.tokens]
    return tokens[: frontier.passed] if frontier.ended else tokens


class _Silent:
    """Stands where a terminal would be."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, *_: object, **__: object) -> None:
        pass


def render(tokens: list[int | None], decode) -> str:  # type: ignore[no-untyped-def]
    """Text of a partly generated sequence, a block for each token that is not there yet."""
    parts = []
    for known, run in itertools.groupby(tokens, key=lambda token: token is not None):
        run_tokens = list(run)
        parts.append(decode(run_tokens) if known else HOLE * len(run_tokens))
    return "".join(parts)


if __name__ == "__main__":
    cli(main)
