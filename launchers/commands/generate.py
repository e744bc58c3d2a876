"""Generate text with a standalone model. A terminal shows the tokens in the order in which they are generated.

    armd generate MODEL_DIR --prompt "..." --streams 4
    armd generate MODEL_DIR --infill "The quick ___:2 jumps over the ___ dog"

--infill fills gaps: ___ stands for one token, ___:N for N tokens.
"""

import argparse
import contextlib
import itertools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from armd_scale.errors import UserError
from launchers.commands import arguments

if TYPE_CHECKING:
    from armd_scale.inference import Frontier

HOLE = "\u2591"
GAP = re.compile(r"_{3,}(?::(\d{1,6}))?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="model directory, written by armd export")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="", help="beginning of the text")
    source.add_argument("--infill", metavar="TEXT", help="text with gaps: ___ is one token, ___:N are N tokens")
    parser.add_argument("--length", type=int, help="tokens of the text, prompt included (default: the model's length)")
    parser.add_argument(
        "--order", choices=("left-to-right", "random"), default="left-to-right", help="generation order of the gaps"
    )
    parser.add_argument("--streams", type=int, default=1, help="strided decoding: tokens per step (default 1)")
    parser.add_argument(
        "--draft", type=arguments.draft, default=0, help="exact parallel decoding: tokens per draft, or auto"
    )
    parser.add_argument("--steps", type=int, default=0, help="masked diffusion: steps (default: one per token)")
    parser.add_argument("--block", type=int, default=0, help="causal diffusion: tokens proposed per pass")
    parser.add_argument(
        "--confidence", type=float, default=0.9, help="causal diffusion: probability that accepts (default 0.9)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the most probable token (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k most probable tokens (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the most probable tokens of total mass p")
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="sample from tokens at least p times as probable as the first"
    )
    parser.add_argument("--stop", action="store_true", help="end at the first end-of-text token")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    arguments.add_device(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")


def run(args: argparse.Namespace) -> None:
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
        args.streams, args.draft, args.temperature, args.top_k, args.top_p, args.min_p, args.steps, args.stop,
        args.block, args.confidence,
    )  # fmt: skip
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
    screen = Live(console=console, auto_refresh=False) if console.is_terminal else None
    with screen or contextlib.nullcontext():
        for step in model.decode([task]):
            frontier.push(step.positions[0].tolist(), step.tokens[0].tolist())
            count += 1
            made += int((step.positions > 0).sum())
            if screen:
                screen.update(Text(render(shown(frontier, inference.FREE), tokenizer.decode)), refresh=True)
    seconds = time.perf_counter() - started
    if not screen:
        print(render(shown(frontier, inference.FREE), tokenizer.decode))
    print(
        f"\n{made} tokens in {count} forward passes ({made / max(count, 1):.2f} a pass), {seconds:.2f} s, "
        f"{made / max(seconds, 1e-9):.0f} tokens/s "
        f"({task.decoding.strategy}, draft {task.decoding.draft}, streams {args.streams}, seed {args.seed}, "
        f"temperature {args.temperature:g})",
        file=sys.stderr,
    )


def gapped(text: str, encode: Callable[[str], list[int]], free: int) -> list[int]:
    """Tokens of a text with gaps, ``free`` for each token of a gap. ``UserError`` when it has none."""
    tokens: list[int] = []
    at = 0
    for gap in GAP.finditer(text):
        tokens += [*encode(text[at : gap.start()]), *[free] * int(gap[1] or 1)]
        at = gap.end()
    if free not in tokens:
        raise UserError("--infill has no gap: write ___ for one token, ___:5 for five")
    return tokens + list(encode(text[at:]))


def shown(frontier: "Frontier", free: int) -> list[int | None]:
    """Tokens to show, None where there is none yet; nothing behind the end of the text."""
    tokens = [None if token == free else token for token in frontier.tokens]
    return tokens[: frontier.passed] if frontier.ended else tokens


def render(tokens: list[int | None], decode: Callable[[list[int]], str]) -> str:
    """Text of a partly generated sequence, a block for each token that is not there yet."""
    parts = []
    for known, group in itertools.groupby(tokens, key=lambda token: token is not None):
        stretch = list(group)
        text = [token for token in stretch if token is not None]
        parts.append(decode(text) if known else HOLE * len(stretch))
    return "".join(parts)
