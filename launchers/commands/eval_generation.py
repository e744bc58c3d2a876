"""Quality against speed: texts of a model under every way of decoding, scored by a judge model.

    armd eval generation MODEL [--judge JUDGE] [--samples 256] [--json OUT.json] [--plot OUT.png]

The judge is a model or run of this project, scored left to right, or a model directory of transformers. The default is
the best run with objective=ar beside the run of the model.
"""

import argparse
from pathlib import Path
from typing import Any

from armd_scale.errors import UserError
from armd_scale.files import check_picture, check_writable
from launchers.commands import arguments

WAYS = {
    "streams": ["streams=1", "streams=2", "streams=4", "streams=8", "streams=16"],
    "draft": ["draft=2", "draft=4", "streams=2,draft=4", "streams=4,draft=4", "streams=8,draft=8"],
    "steps": ["steps=1024", "steps=256", "steps=64", "steps=16"],
    "block": ["block=0", "block=2", "block=4", "block=8", "block=8,confidence=0.7", "block=8,confidence=0.5"],
}
"""Ways of decoding that are measured by default, by the setting of the model's objective that they use."""


ACCEPTANCE_TEXTS = 16
"""Number of texts on which the acceptance of drafts is measured."""


BRANCHES = 64
"""Likeliest tokens behind a place whose continuations give the exact law."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model directory, run directory, or a checkpoint of a run")
    parser.add_argument("--judge", type=Path, help="model or run that scores the texts (default: best ar run)")
    parser.add_argument("--ways", nargs="+", metavar="FIELD=VALUE,...", help="ways of decoding, as fields of Decoding")
    parser.add_argument("--samples", type=int, default=256, help="texts of each way (default 256)")
    parser.add_argument("--batch", type=int, default=1, help="texts decoded at a time (default 1)")
    parser.add_argument("--length", type=int, help="tokens of a text (default: the model's length)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the texts (default 0)")
    parser.add_argument(
        "--marginal-places",
        type=int,
        default=0,
        metavar="N",
        help="also estimate the acceptance of drafts from the exact law of the token, at N places (default 0: do not)",
    )
    arguments.add_device(parser)
    arguments.add_json(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot of quality against speed")


def run(args: argparse.Namespace) -> None:
    if args.samples < 1 or args.batch < 1:
        raise UserError("--samples and --batch must be at least 1")
    if args.marginal_places < 0:
        raise UserError("--marginal-places must be at least 0")
    if args.json:
        check_writable(args.json)
    if args.plot:
        check_picture(args.plot)

    from armd_scale import inference
    from armd_scale.evaluation import generation
    from armd_scale.evaluation.models import open_model

    model, tokenizer = open_model(args.model, args.device)
    judge = generation.load_judge(args.judge or generation.find_judge(args.model))
    length = model.config.length if args.length is None else args.length
    print(
        f"{args.samples} texts of {length} tokens from nothing, {args.batch} at a time; temperature 1 unless named; "
        f"judge: {judge.name}"
    )
    print(f"{'':<28}{'tokens/s':>10}{'tokens/pass':>12}{'judge ppl':>16}{'entropy (nats)':>18}{'distinct-2':>12}")
    rows: list[dict[str, Any]] = []
    exact: generation.Sample | None = None  # texts of the law of one token a block
    default = [way for setting in model.config.traits.settings for way in WAYS[setting]] or ["streams=1"]
    for way in args.ways or default:
        decoding = inference.Decoding(**_fields(way))
        model.generate(length=length, decoding=decoding, batch=args.batch)  # warm-up
        sample = generation.sample(model, decoding, args.samples, length, args.batch, args.seed)
        if decoding.strategy == "exact" and decoding.streams == 1 and decoding.temperature == 1:
            exact = exact or sample
        figures = generation.quality([tokenizer.decode(text) for text in sample.tokens], sample.tokens, judge)
        row = {
            "way": way,
            "strategy": decoding.strategy,
            "tokens_per_second": sample.tokens_per_second,
            "tokens_per_pass": sample.tokens_per_pass,
            **figures.as_dict(),
        }
        rows.append(row)
        print(
            f"{way:<28}{row['tokens_per_second']:>10.0f}{row['tokens_per_pass']:>12.2f}"
            f"{figures.perplexity:>10.2f} ±{figures.perplexity_se:<4.2f}{figures.entropy:>11.3f} "
            f"±{figures.entropy_se:<5.3f}{figures.distinct_2:>11.3f}",
            flush=True,
        )
    facts = {"model": str(args.model), "judge": judge.name, "length": length, "batch": args.batch, "rows": rows}
    if exact:
        facts["acceptance"], facts["tokens_per_pass"] = accepted, written = generation.acceptance(
            model, exact.tokens[:ACCEPTANCE_TEXTS]
        )
        print(
            f"acceptance of drafts left to right at places 1, 2, ... behind the next token: "
            f"{' '.join(f'{value:.3f}' for value in accepted)}; {written:.2f} tokens a pass"
        )
        if args.marginal_places:
            ideal = generation.marginal_acceptance(model, exact.tokens, args.marginal_places, BRANCHES, args.seed)
            facts["marginal"] = ideal._asdict()
            print(
                f"drafts from the exact law: {ideal.acceptance:.3f} ± {ideal.error:.3f} accepted at place 1 "
                f"({args.marginal_places} places, {BRANCHES} tokens each, {ideal.covered:.0%} of the probability)"
            )
    arguments.write_json(args.json, facts)
    if args.plot:
        plot(rows, judge.name, args.plot)


def _fields(way: str) -> dict[str, Any]:
    """``streams=4,entropy=0.5`` -> fields of ``Decoding``."""
    from armd_scale.inference import Decoding

    fields: dict[str, Any] = {}
    for part in way.split(","):
        name, _, value = part.partition("=")
        if name == "stop":
            raise UserError("texts of one length are compared: leave out stop")
        if name not in Decoding.__dataclass_fields__:
            raise UserError(f"unknown field '{name}' in {way}: use {', '.join(Decoding.__dataclass_fields__)}")
        try:
            if (name, value) == ("draft", "auto"):
                fields[name] = value
                continue
            fields[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError as error:
            raise UserError(f"{way}: '{value}' is not a number") from error
    return fields


def plot(rows: list[dict[str, Any]], judge: str, path: Path) -> None:
    """Judge perplexity and entropy against speed, a line for each strategy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), dpi=120)
    kinds = [("strided", "C0", "strided, S streams"), ("exact", "C1", "exact parallel, by S streams")]
    kinds += [("ancestral", "C2", "masked diffusion"), ("confident", "C3", "causal diffusion, by confidence")]
    for axes, field, title in zip(
        panels, ("perplexity", "entropy"), (f"perplexity under {judge}", "entropy of a text, nats"), strict=True
    ):
        for kind, colour, label in kinds:
            group = sorted((r for r in rows if r["strategy"] == kind), key=lambda r: r["tokens_per_second"])
            if not group:
                continue
            axes.errorbar(
                [r["tokens_per_second"] for r in group],
                [r[field] for r in group],
                yerr=[r[f"{field}_se"] for r in group],
                fmt="o-" if kind == "strided" else "o",
                color=colour,
                ms=4,
                lw=1.2,
                capsize=2,
                label=label,
            )
            for r in group:
                axes.annotate(
                    r["way"].replace("streams=", "S=").replace("draft=", "k="),
                    (r["tokens_per_second"], r[field]),
                    xytext=(3, 4),
                    textcoords="offset points",
                    fontsize=6,
                    color=colour,
                )
        axes.set_xlabel("tokens/s")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.2)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
