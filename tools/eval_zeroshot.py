"""Score a standalone model on texts: perplexity per token and bits per byte, exactly.

    python tools/eval_zeroshot.py MODEL_DIR --text FILE... [--order left-to-right strided:4] [--json OUT.json]

Each file's documents + EOS are concatenated and cut into chunks of the model's length; every token is scored, the last
partial chunk too, without a sliding window.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armd_scale.errors import UserError, cli


def main() -> None:
    parser = argparse.ArgumentParser(description="Likelihood of texts under a standalone model")
    parser.add_argument("model", type=Path, help="model folder, as made by tools/convert_ckpt.py")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="txt, jsonl or parquet, also packed")
    parser.add_argument("--text-field", default="text", help="field of jsonl records or parquet columns")
    parser.add_argument(
        "--order",
        nargs="+",
        default=["left-to-right"],
        help="left-to-right (exact and the default), shuffled:K, strided:S; one row each",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the figures to FILE, or alone to standard output"
    )
    args = parser.parse_args()

    from armd_scale import inference
    from armd_scale import tokenizer as tokenizers
    from armd_scale.evaluation import likelihood
    from armd_scale.files import write_atomically
    from data_pipeline import readers

    for order in args.order:
        likelihood.parse_order(order)
    for name in args.text:
        if not Path(name).is_file():
            raise UserError(f"there is no text file {name}")
    alone = args.json == "-"
    if args.json and not alone:
        write_atomically(Path(args.json), "{}\n")  # find out before the work that it can be written
    screen = sys.stderr if alone else sys.stdout
    model = inference.load(args.model, device=args.device)
    tokenizer = tokenizers.load(args.model, model.config.vocab_size)
    print(
        f"model {args.model}; tokenizer {tokenizer.path.name} ({tokenizer.vocab_size} entries); protocol: tokens + "
        f"EOS per document, chunks of {model.config.length}, BOS before each, every token scored, no sliding window",
        file=screen,
    )
    results = []
    for name in args.text:
        documents = list(readers.documents([name], args.text_field))
        tokens = [t for text in documents for t in [*tokenizer.encode(text), tokenizer.eos_id]]
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in documents)
        digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        if not tokens:
            raise UserError(f"{name} holds no text")
        print(
            f"\n{name}  SHA-256 {digest}\n{size:,} bytes, {len(documents):,} documents, {len(tokens):,} scored tokens",
            file=screen,
        )
        print(f"{'order':<16}{'perplexity':>12}{'nats/token':>12}{'bits/byte':>12}", file=screen)
        for order in args.order:
            score = likelihood.score(model, likelihood.cut(tokens, model.config.length), order, size)
            print(f"{order:<16}{score.perplexity:>12.3f}{score.nll:>12.4f}{score.bits_per_byte:>12.4f}", file=screen)
            results.append({"text": name, "sha256": digest, "bytes": size, **score.as_dict()})
    figures = json.dumps({"model": str(args.model), "results": results}, indent=1)
    if alone:
        print(figures)
    elif args.json:
        write_atomically(Path(args.json), figures + "\n")


if __name__ == "__main__":
    cli(main)
