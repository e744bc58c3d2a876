"""Score a model on texts: perplexity per token and bits per byte, with everything that they depend on.

    python tools/eval_zeroshot.py MODEL --suite zeroshot --data DIR [--json OUT.json]
    python tools/eval_zeroshot.py MODEL --text FILE... [--order left-to-right strided:4]

MODEL is a model folder, a run folder (its newest checkpoint, of any layout), or a checkpoint in one. The suite's texts
are looked for in DIR (docs/evaluation.md has the table of files), or on a hub with ``--data hub``.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armd_scale.errors import UserError, cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="model folder, run folder, or a checkpoint in one")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--suite", choices=["zeroshot"], help="the texts of the zero-shot tables")
    source.add_argument("--text", nargs="+", metavar="FILE", help="txt, jsonl or parquet, also packed; documents as is")
    parser.add_argument("--data", help="folder with the suite's texts, or 'hub'")
    parser.add_argument("--text-field", default="text", help="field of jsonl records or parquet columns of --text")
    parser.add_argument(
        "--order",
        nargs="+",
        help="left-to-right (exact), shuffled:K, strided:S, or bound (masked diffusion); default: what the model has, "
        "side by side",
    )
    parser.add_argument("--repeats", type=int, default=2, help="draws of shuffles or noise for every chunk (default 2)")
    parser.add_argument("--no-detokenise", action="store_true", help="leave the suite's texts as they are")
    parser.add_argument("--no-eos", action="store_true", help="no EOS behind documents")
    parser.add_argument("--length", type=int, help="tokens of a chunk (default: the model's length)")
    parser.add_argument(
        "--wikitext2-split", choices=["test", "train"], default="test", help="train: as the published column was scored"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--processes", type=int, help="processes that share the work (default: one a core, or a GPU)")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the figures to FILE, or alone to standard output"
    )
    args = parser.parse_args()

    import torch

    from armd_scale.evaluation import accuracy, likelihood, suites
    from armd_scale.evaluation.models import alone as in_process
    from armd_scale.evaluation.models import open_model, resolve, workers
    from armd_scale.files import check_writable, write_atomically

    for order in args.order or []:
        likelihood.parse_order(order)
    if args.suite and not args.data:
        raise UserError("--suite needs --data: the folder with its texts, or hub")
    if args.repeats < 2 or (args.processes is not None and args.processes < 1):
        raise UserError("--repeats must be at least 2 (the error comes from their spread), --processes at least 1")
    alone = args.json == "-"
    if args.json and not alone:
        check_writable(Path(args.json))
    screen = sys.stderr if alone else sys.stdout

    def say(line: str = "") -> None:
        print(line, file=screen, flush=True)

    place = resolve(args.model)  # a run that goes on would have another newest checkpoint later
    model, tokenizer = open_model(place, args.device)
    length = model.config.length if args.length is None else args.length
    if not 2 <= length <= model.config.length:
        raise UserError(f"--length {length} does not fit this model: 2 to {model.config.length}")
    protocol = suites.Protocol(
        not (args.no_detokenise or args.text), not args.no_eos, args.length, args.wikitext2_split
    )
    orders = args.order or (likelihood.default_orders(model) if args.suite else likelihood.default_orders(model)[:1])
    say(
        f"model {place} ({model.config.objective}); tokenizer {tokenizer.path.name} ({tokenizer.vocab_size} "
        f"entries)\nprotocol: {protocol}; {args.repeats} draws where something is drawn"
    )
    cuda = args.device.startswith("cuda")
    devices = max(1, torch.cuda.device_count()) if args.device == "cuda" else 1
    processes = args.processes or (devices if cuda else len(os.sched_getaffinity(0)))
    results: list[dict[str, Any]] = []
    accuracies: dict[str, dict[str, float]] = {}
    sources = _suite(args, protocol, say) if args.suite else _texts(args)
    cut = [suites.chunks(documents, tokenizer, length, protocol) for *_, documents, _ in sources]
    processes = min(processes, max(len(likelihood.units(chunks)) for chunks in cut))
    if not cuda:
        torch.set_num_threads(1)  # as the processes have: see models.workers
    with contextlib.ExitStack() as stack:
        each = in_process(model)
        if processes > 1:
            del model, each
            each = stack.enter_context(workers(place, args.device, processes))
        for (name, where, digest, documents, size), chunks in zip(sources, cut, strict=True):
            count = sum(map(len, chunks))
            say(f"\n{name}  {where}  SHA-256 {digest or 'unknown'}")
            say(f"{size:,} bytes, {len(documents):,} documents, {count:,} scored tokens")
            say(f"{'order':<16}{'perplexity':>12}{'±':>9}{'nats/token':>12}{'±':>9}{'bits/byte':>12}")
            for order in orders:
                score = likelihood.score(each, chunks, order, size, args.repeats)
                say(
                    f"{order:<16}{score.perplexity:>12.3f}{score.perplexity_se:>9.3f}{score.nll:>12.4f}"
                    f"{score.nll_se:>9.4f}{score.bits_per_byte:>12.4f}"
                )
                results.append({"text": name, "file": where, "sha256": digest, "bytes": size, **score.as_dict()})
            if name == "LAMBADA":
                words = accuracy.last_words(each, tokenizer, documents, length)
                say(f"last word: {words.value:.2%} ± {words.se:.2%} of {words.passages:,}")
                accuracies[name] = {"last_word": words.value, "se": words.se, "passages": words.passages}
    if args.suite:
        say("\n" + table(results, suites.PUBLISHED))
    facts = {"model": str(place), "protocol": vars(protocol), "results": results, "accuracy": accuracies}
    figures = json.dumps(facts, indent=1)
    if alone:
        print(figures)
    elif args.json:
        write_atomically(Path(args.json), figures + "\n")


def _texts(args: argparse.Namespace) -> list[tuple[str, str, str, list[str], int]]:
    """Name, place, SHA-256, documents and bytes of the texts on the command line."""
    from armd_scale.data import readers
    from armd_scale.files import sha256

    found = []
    for name in args.text:
        if not Path(name).is_file():
            raise UserError(f"there is no text file {name}")
        documents = list(readers.documents([name], args.text_field))
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in documents)
        if not size:
            raise UserError(f"{name} holds no text")
        found.append((name, name, sha256(Path(name)), documents, size))
    return found


def _suite(args: argparse.Namespace, protocol: Any, say: Any) -> list[tuple[str, str, str | None, list[str], int]]:
    """The same of the suite's texts that are there; says which are not, and which are not the expected files."""
    from armd_scale.evaluation import suites
    from armd_scale.files import sha256

    if args.data == "hub":
        return [(text.name, text.hub[0], None, *suites.read_hub(text, protocol)) for text in suites.SETS.values()]
    folder, found = Path(args.data), []
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the one with the suite's texts, or hub")
    for text in suites.SETS.values():
        split = protocol.wikitext2_split if text.name == "WikiText2" else "test"
        path = suites.find(text, folder, split)
        if path is None:
            names = ", ".join(text.files if split == "test" else text.train_files)
            say(f"{text.name}: not in {folder} ({names})")
            continue
        digest = sha256(path)
        if split == "test" and text.sha256 not in (None, digest):
            say(f"{text.name}: {path} is not the file of the table (SHA-256 {text.sha256}): figures will differ")
        found.append((text.name, str(path), digest, *suites.read(text, path, protocol)))
    if not found:
        raise UserError(f"{folder} holds none of the suite's texts; docs/evaluation.md lists their files")
    return found


def table(results: list[dict[str, Any]], published: dict[str, dict[str, float]]) -> str:
    """Perplexities side by side, a row for each order, and the paper's rows below."""
    texts = list(dict.fromkeys(row["text"] for row in results))
    rows = {order: {} for order in dict.fromkeys(row["order"] for row in results)}
    for row in results:
        rows[row["order"]][row["text"]] = row["perplexity"]
    rows |= {f"paper: {name}": values for name, values in published.items()}
    first, widths = max(map(len, rows)) + 2, [max(13, len(text) + 2) for text in texts]
    lines = ["perplexity".ljust(first) + "".join(text.rjust(w) for text, w in zip(texts, widths, strict=True))]
    for name, values in rows.items():
        cells = (f"{values[text]:.2f}" if text in values else "" for text in texts)
        lines.append(name.ljust(first) + "".join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)


if __name__ == "__main__":
    cli(main)
