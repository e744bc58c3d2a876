"""Score a model on texts: perplexity per token and bits per byte, with all that the figures depend on.

    armd eval zeroshot MODEL --suite zeroshot --data DIR [--json OUT.json]
    armd eval zeroshot MODEL --text FILE... [--order left-to-right strided:4]

MODEL is a model directory, a run directory (its newest checkpoint, of any layout), a checkpoint of a run, or a
directory of transformers, which is scored left to right. The texts of the suite are files in DIR
(docs/howto/evaluation.md lists them), or come from a hub with --data hub.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from armd_scale.errors import UserError
from launchers.commands import arguments

if TYPE_CHECKING:
    from armd_scale.evaluation.suites import Protocol


class _Text(NamedTuple):
    """A text to score."""

    name: str
    file: str
    sha256: str | None
    documents: list[str]
    size: int
    """Bytes before detokenisation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model directory, run directory, or a checkpoint of a run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--suite", choices=["zeroshot"], help="score the texts of the zero-shot tables")
    source.add_argument("--text", nargs="+", metavar="FILE", help="score txt, jsonl or parquet files, also compressed")
    parser.add_argument("--data", help="directory with the texts of the suite, or 'hub'")
    parser.add_argument("--text-field", default="text", help="text field of jsonl records or parquet files of --text")
    parser.add_argument(
        "--order",
        nargs="+",
        help="left-to-right (exact), shuffled:K, groups:K, strided:S, infill (the middle third of a chunk given the "
        "rest), or bound (masked diffusion); default: those of the model's objective, the first one for --text",
    )
    parser.add_argument(
        "--by-place",
        action="store_true",
        help="also nats per token by the place of the token in its chunk, or in its stream",
    )
    parser.add_argument("--repeats", type=int, default=2, help="random orders or noise per chunk (default 2)")
    parser.add_argument("--no-detokenise", action="store_true", help="do not detokenise the texts of the suite")
    parser.add_argument("--no-eos", action="store_true", help="do not append EOS to documents")
    parser.add_argument("--length", type=int, help="tokens of a chunk (default: the model's length)")
    parser.add_argument(
        "--wikitext2-split", choices=["test", "train"], default="test", help="train: as in the published column"
    )
    parser.add_argument(
        "--splits", choices=["test", "mdlm"], default="test", help="mdlm: validation splits, where MDLM's code has them"
    )
    parser.add_argument(
        "--blocks", choices=["chunks", "mdlm"], default="chunks", help="mdlm: blocks of BOS, L - 2 tokens and EOS"
    )
    parser.add_argument(
        "--scientific-field",
        choices=["abstract", "article"],
        default="abstract",
        help="text of scientific papers; article: as in MDLM's code",
    )
    arguments.add_device(parser)
    parser.add_argument("--processes", type=int, help="number of processes (default: one per core or GPU)")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the figures to FILE, or without FILE to stdout",
    )


def run(args: argparse.Namespace) -> None:
    import torch

    from armd_scale.evaluation import accuracy, likelihood, suites
    from armd_scale.evaluation.models import alone, open_scored, resolve, workers
    from armd_scale.files import check_writable, write_atomically

    for order in args.order or []:
        likelihood.parse_order(order)
    if args.suite and not args.data:
        raise UserError("--suite needs --data: the directory with its texts, or hub")
    if args.repeats < 2 or (args.processes is not None and args.processes < 1):
        raise UserError("--repeats must be at least 2 (the error comes from their spread), --processes at least 1")
    to_stdout = args.json == "-"
    if args.json and not to_stdout:
        check_writable(Path(args.json))
    screen = sys.stderr if to_stdout else sys.stdout

    def say(line: str = "") -> None:
        print(line, file=screen, flush=True)

    source = resolve(args.model)  # resolved once, as a running job may write newer checkpoints
    model, tokenizer = open_scored(source, args.device)
    length = model.config.length if args.length is None else args.length
    least = 3 if args.blocks == "mdlm" else 2
    if not least <= length <= model.config.length:
        raise UserError(f"--length {length} does not fit this model: {least} to {model.config.length}")
    protocol = suites.Protocol(
        detokenise=not (args.no_detokenise or args.text),
        eos=not args.no_eos,
        length=args.length,
        wikitext2_split=args.wikitext2_split,
        splits=args.splits,
        blocks=args.blocks,
        scientific_field=args.scientific_field,
    )
    orders = args.order or (likelihood.default_orders(model) if args.suite else likelihood.default_orders(model)[:1])
    say(
        f"model {source} ({model.config.objective}); tokenizer {tokenizer.path.name} ({tokenizer.vocab_size} "
        f"entries)\nprotocol: {protocol}; {args.repeats} draws where something is drawn"
    )
    cuda = args.device.startswith("cuda")
    devices = max(1, torch.cuda.device_count()) if args.device == "cuda" else 1
    processes = args.processes or (devices if cuda else len(os.sched_getaffinity(0)))
    results: list[dict[str, Any]] = []
    accuracies: dict[str, dict[str, float]] = {}
    texts = _suite(args, protocol, say) if args.suite else _texts(args)
    chunks_of = [suites.chunks(text.documents, tokenizer, length, protocol) for text in texts]
    processes = min(processes, max(len(likelihood.units(chunks)) for chunks, _ in chunks_of))
    if not cuda:
        torch.set_num_threads(1)  # as the processes have: see models.workers
    with contextlib.ExitStack() as stack:
        scorer = alone(model)
        if processes > 1:
            del model, scorer
            scorer = stack.enter_context(workers(source, args.device, processes))
        for text, (chunks, share) in zip(texts, chunks_of, strict=True):
            count = sum(map(len, chunks))
            say(f"\n{text.name}  {text.file}  SHA-256 {text.sha256 or 'unknown'}")
            say(f"{text.size:,} bytes, {len(text.documents):,} documents, {count:,} scored tokens")
            say(f"{'order':<16}{'perplexity':>12}{'±':>9}{'nats/token':>12}{'±':>9}{'bits/byte':>12}")
            for order in orders:
                score = likelihood.score(scorer, chunks, order, text.size * share, args.repeats)
                say(
                    f"{order:<16}{score.perplexity:>12.3f}{score.perplexity_se:>9.3f}{score.nll:>12.4f}"
                    f"{score.nll_se:>9.4f}{score.bits_per_byte:>12.4f}"
                )
                places = likelihood.by_place(scorer, chunks, order) if args.by_place else []
                for group in places:
                    name = f"  {group['first']:,.0f} to {group['last']:,.0f}"
                    say(f"{name:<16}{'':>12}{'':>9}{group['nll']:>12.4f}")
                text_facts = {"text": text.name, "file": text.file, "sha256": text.sha256, "bytes": text.size}
                results.append({**text_facts, **score.as_dict(), **({"places": places} if places else {})})
            if text.name == "LAMBADA":
                words = accuracy.last_words(scorer, tokenizer, text.documents, length)
                say(f"last word: {words.value:.2%} ± {words.se:.2%} of {words.passages:,}")
                accuracies[text.name] = {"last_word": words.value, "se": words.se, "passages": words.passages}
    if args.suite:
        say("\n" + table(results, suites.PUBLISHED) + "\n" + suites.COMPARISON)
    facts = {"model": str(source), "protocol": vars(protocol), "results": results, "accuracy": accuracies}
    figures = json.dumps(facts, indent=1)
    if to_stdout:
        print(figures)
    elif args.json:
        write_atomically(Path(args.json), figures + "\n")


def _texts(args: argparse.Namespace) -> list[_Text]:
    """The texts on the command line."""
    from armd_scale.data import readers
    from armd_scale.files import sha256

    texts = []
    for name in args.text:
        if not Path(name).is_file():
            raise UserError(f"there is no text file {name}")
        documents = list(readers.documents([name], args.text_field))
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in documents)
        if not size:
            raise UserError(f"{name} holds no text")
        texts.append(_Text(name, name, sha256(Path(name)), documents, size))
    return texts


def _suite(args: argparse.Namespace, protocol: "Protocol", say: Callable[[str], None]) -> list[_Text]:
    """The texts of the suite that exist; ``say`` reports missing files and files with another hash than expected."""
    from armd_scale.evaluation import suites
    from armd_scale.files import sha256

    if args.data == "hub":
        return [_Text(text.name, text.hub[0], None, *suites.read_hub(text, protocol)) for text in suites.SETS.values()]
    folder, texts = Path(args.data), []
    if not folder.is_dir():
        raise UserError(f"there is no directory {folder}: name the one with the suite's texts, or hub")
    for text in suites.SETS.values():
        split = protocol.split(text)
        path = suites.find(text, folder, split)
        if path is None:
            say(f"{text.name}: not in {folder} ({', '.join(text.files_of(split))})")
            continue
        digest = sha256(path)
        if split == "test" and text.sha256 and digest not in text.sha256:
            say(f"{text.name}: {path} is not the file of the table (SHA-256 {text.sha256[0]}): figures will differ")
        texts.append(_Text(text.name, str(path), digest, *suites.read(text, path, protocol)))
    if not texts:
        raise UserError(f"{folder} holds none of the suite's texts; docs/howto/evaluation.md lists their files")
    return texts


def table(results: list[dict[str, Any]], published: dict[str, dict[str, float]]) -> str:
    """Perplexities side by side, a row for each order, and the paper's rows below."""
    texts = list(dict.fromkeys(row["text"] for row in results))
    rows: dict[str, dict[str, float]] = {order: {} for order in dict.fromkeys(row["order"] for row in results)}
    for row in results:
        rows[row["order"]][row["text"]] = row["perplexity"]
    rows |= {f"paper: {name}": values for name, values in published.items()}
    first, widths = max(map(len, rows)) + 2, [max(13, len(text) + 2) for text in texts]
    lines = ["perplexity".ljust(first) + "".join(text.rjust(w) for text, w in zip(texts, widths, strict=True))]
    for name, values in rows.items():
        cells = (f"{values[text]:.2f}" if text in values else "" for text in texts)
        lines.append(name.ljust(first) + "".join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)
