"""Generate text with a standalone model; on a terminal it appears in the order in which it is generated.

python tools/generate.py MODEL_DIR --prompt "..." --streams 4
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armd_scale.errors import UserError, cli

GAP = "\u2591"


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate text with a standalone model")
    parser.add_argument("model", type=Path, help="model folder, as made by tools/convert_ckpt.py")
    parser.add_argument("--prompt", default="", help="text to go on from")
    parser.add_argument("--length", type=int, help="tokens of the text, prompt included (default: the model's length)")
    parser.add_argument("--streams", type=int, default=1, help="tokens generated a step (default 1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    args = parser.parse_args()

    import torch
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from armd_scale import inference
    from armd_scale import tokenizer as tokenizers
    from data_pipeline.readers import encodable

    model = inference.load(args.model, device=args.device)
    tokenizer = tokenizers.load(args.model, model.config.vocab_size)
    if not encodable(args.prompt):
        raise UserError("the prompt is not UTF-8 text: check the encoding of the terminal")
    prompt = tokenizer.encode(args.prompt)
    length = model.config.length if args.length is None else args.length
    steps = model.decode(torch.tensor([prompt], dtype=torch.long), length, args.streams, args.temperature, args.seed)
    tokens: list[int | None] = [*prompt, *[None] * (length - len(prompt))]
    console = Console()
    count, started = 0, time.perf_counter()
    with Live(console=console, auto_refresh=False) if console.is_terminal else _Silent() as screen:
        for step in steps:
            for position, token in zip(step.positions, step.tokens[0].tolist(), strict=True):
                tokens[position - 1] = token
            count += 1
            screen.update(Text(render(tokens, tokenizer.decode)), refresh=True)
    seconds = time.perf_counter() - started
    if not console.is_terminal:
        print(render(tokens, tokenizer.decode))
    made = length - len(prompt)
    print(
        f"\n{made} tokens in {count} steps, {seconds:.2f} s, {made / max(seconds, 1e-9):.0f} tokens/s "
        f"(streams {args.streams}, seed {args.seed}, temperature {args.temperature:g})",
        file=sys.stderr,
    )


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
        parts.append(decode(run_tokens) if known else GAP * len(run_tokens))
    return "".join(parts)


if __name__ == "__main__":
    cli(main)
