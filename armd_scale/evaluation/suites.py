"""The zero-shot suite: its texts, how they are read and detokenised, and published results.

Protocol (docs/howto/evaluation.md; SEDD arXiv 2310.16834, MDLM 2406.07524, RADD 2406.03736): each text is detokenised
(``DETOKENISERS``), tokens + EOS of its documents are concatenated, and the tokens are split into chunks of the model's
length. The options of the protocol are the fields of ``Protocol``.
"""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from armd_scale.data import readers
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.errors import UserError
from armd_scale.evaluation.likelihood import cut


@dataclass(frozen=True)
class Protocol:
    """Options of an evaluation, with the defaults of the suite."""

    detokenise: bool = True
    """Whether to undo the word splitting of a text."""
    eos: bool = True
    """Whether to put EOS after every document."""
    length: int | None = None
    """Number of tokens of a chunk; None: the model's length."""
    wikitext2_split: str = "test"
    """``train`` reproduces the published WikiText2 column, which was scored on the training split."""

    def __str__(self) -> str:
        length = "the model's length" if self.length is None else f"{self.length} tokens"
        return (
            f"documents {'detokenised' if self.detokenise else 'as stored'}, blank ones left out, "
            f"tokens{' + EOS' if self.eos else ''}, "
            f"concatenated, cut into chunks of {length}; BOS before each chunk, every token scored, no sliding window, "
            f"last partial chunk scored; WikiText2 {self.wikitext2_split} split"
        )


@dataclass(frozen=True)
class TextSet:
    """A text of the suite."""

    name: str
    files: tuple[str, ...]
    """File names of the text, in the order of preference."""
    sha256: tuple[str, ...]
    """SHA-256 of the expected file, in its usual forms; empty if unknown."""
    fields: tuple[str, ...]
    """Field of a record that holds the text, or columns to join (``2+3``)."""
    detokeniser: str
    hub: tuple[str, str | None, str]
    """Path, configuration and split for ``datasets``."""
    train_files: tuple[str, ...] = ()
    """File names of the training split, where a published figure uses it."""


SETS = {
    text.name: text
    for text in (
        TextSet(
            "LAMBADA",
            ("lambada_test.jsonl", "lambada.jsonl"),
            ("4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",),
            ("text",),
            "lambada",
            ("EleutherAI/lambada_openai", "default", "test"),
        ),
        TextSet(
            "WikiText2",
            ("wikitext2_raw_test.txt", "wiki.test.raw", "wikitext2.parquet"),
            ("4f3e427e4aff23acff917a8a51aeae21bf12832256e26914c8fc250dcef4103c",),
            ("text",),
            "wikitext",
            ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
            ("wikitext2_raw_train.txt", "wiki.train.raw"),
        ),
        TextSet(
            "PTB",
            ("ptb.test.txt", "ptb_test.txt"),
            (
                "91a2fa938d84baddaa05a3d67a5698924847eca8a4e7faa1518f3fd11c3d6d73",
                "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",  # with its last line feed
            ),
            ("sentence", "text"),
            "ptb",
            ("ptb-text-only/ptb_text_only", None, "test"),
        ),
        TextSet(
            "WikiText103",
            ("wikitext103_raw_test.txt", "wikitext103.parquet"),
            ("4f3e427e4aff23acff917a8a51aeae21bf12832256e26914c8fc250dcef4103c",),
            ("text",),
            "wikitext",
            ("Salesforce/wikitext", "wikitext-103-raw-v1", "test"),
        ),
        TextSet(
            "1BW",
            ("lm1b_heldout_00000.txt", "lm1b_test.txt", "news.en.heldout-00000-of-00050"),
            ("265dccd51762253e20425c21ff6ddf09e6da2e11a365da399b0390eebb2d52c8",),
            ("text",),
            "lm1b",
            ("billion-word-benchmark/lm1b", "plain_text", "test"),
        ),
        TextSet(
            "AG News",
            ("ag_news_test.csv", "test.csv", "ag_news.jsonl", "ag_news.parquet"),
            ("521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699",),
            ("text", "2+3"),
            "none",
            ("fancyzhx/ag_news", "default", "test"),
        ),
        TextSet(
            "Scientific abstracts",
            ("scientific_papers_test.jsonl", "scientific_papers.parquet", "abstracts.jsonl", "abstracts.txt"),
            (),
            ("abstract", "text"),
            "scientific",
            ("armanc/scientific_papers", "arxiv", "test"),
        ),
    )
}
"""The suite, in the order of the tables."""

PUBLISHED: dict[str, dict[str, float]] = {
    "ARMD small, 180K steps": {
        "LAMBADA": 44.66, "WikiText2": 36.25, "PTB": 130.31, "WikiText103": 35.66, "1BW": 53.18,
    },
    "ARMD small, 400K steps": {
        "LAMBADA": 45.35, "WikiText2": 35.64, "PTB": 123.43, "WikiText103": 35.15, "1BW": 52.94,
    },
    "ARMD medium, 300K steps": {
        "LAMBADA": 39.08, "WikiText2": 26.06, "PTB": 97.75, "WikiText103": 25.55, "1BW": 43.91,
    },
}  # fmt: skip
"""Zero-shot perplexities of the paper (arXiv 2601.16971), GPT-2 tokens, chunks of 1,024."""


def find(text: TextSet, folder: Path, split: str = "test") -> Path | None:
    """The file of a text in a directory; None if it does not exist.

    WikiText103 and WikiText2 have the same test articles and can share a file.
    """
    names = text.files if split == "test" else text.train_files
    if text.name == "WikiText103":
        names = (*names, *SETS["WikiText2"].files)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read(text: TextSet, path: Path, protocol: Protocol) -> tuple[list[str], int]:
    """Documents of a text as the protocol scores them, and their number of UTF-8 bytes. Raises ``UserError``."""
    return _prepared(text, _records(text, path), protocol, str(path))


def read_hub(text: TextSet, protocol: Protocol) -> tuple[list[str], int]:
    """``read`` from a hub of data sets; ``UserError`` if the hub cannot be reached."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("datasets is not installed: pip install -c constraints.txt -e '.[eval]'") from error
    path, name, split = text.hub
    split = protocol.wikitext2_split if text.name == "WikiText2" else split
    try:
        rows = load_dataset(path, name, split=split)
    except Exception as error:  # network, proxy, access rights, format
        raise UserError(f"{text.name} cannot be read from {path}: {error}; name a directory with --data") from error
    return _prepared(text, (_field(text, row, path) for row in rows), protocol, path)


def chunks(documents: Sequence[str], tokenizer: Tokenizer, length: int, protocol: Protocol) -> list[np.ndarray]:
    """Tokenise documents and split the tokens into chunks."""
    end = np.array([tokenizer.eos_id] if protocol.eos else [], dtype=np.int64)
    encoded = [np.asarray(tokens, dtype=np.int64) for tokens in tokenizer.encode_batch(list(documents))]
    joined = np.concatenate([part for tokens in encoded for part in (tokens, end)])
    return cut(joined, protocol.length or length)


def _prepared(text: TextSet, records: Iterator[str], protocol: Protocol, where: str) -> tuple[list[str], int]:
    detokenise = DETOKENISERS[text.detokeniser] if protocol.detokenise else str
    documents = [detokenise(record) for record in records if record.strip()]
    size = sum(len(document.encode("utf-8", "surrogatepass")) for document in documents)
    if not size:
        raise UserError(f"{where} holds no text: check the file")
    return documents, size


def _records(text: TextSet, path: Path) -> Iterator[str]:
    """Texts of the records of a file. Lines of WikiText keep their line ends, as in the published data sets."""
    if path.suffix == ".csv":
        try:
            with path.open(encoding="utf-8", newline="") as file:
                first, *rest = list(csv.reader(file)) or [[]]
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read as csv in UTF-8: {error}") from error
        named = set(first) & set(text.fields)
        for row in rest if named else [first, *rest]:
            yield _field(text, dict(zip(first, row, strict=False)) if named else dict(enumerate(row, 1)), str(path))
    elif path.suffix in (".jsonl", ".parquet"):
        field = next((name for name in text.fields if _has(path, name)), None)
        if field is None:
            raise UserError(f"{path} has none of the fields {', '.join(text.fields)}: rename a field")
        yield from readers.documents([str(path)], field)
    else:
        try:
            with path.open(encoding="utf-8", newline="\n") as file:
                for line in file:
                    yield line.replace("\r\n", "\n") if text.detokeniser == "wikitext" else line.strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}") from error


def _has(path: Path, field: str) -> bool:
    try:
        return next(iter(readers.documents([str(path)], field)), None) is not None
    except UserError:
        return False


def _field(text: TextSet, row: dict[Any, Any], where: str) -> str:
    """The text of a record: a field, or the columns ``a+b`` of a file without column names."""
    for name in text.fields:
        if name in row:
            return str(row[name])
        columns = [int(part) for part in name.split("+")] if name[0].isdigit() else []
        if columns and all(column in row for column in columns):
            return " ".join(str(row[column]) for column in columns)
    raise UserError(f"{where}: a record has none of the fields {', '.join(text.fields)}: rename a field")


# Detokenisers follow the published evaluations, so that figures are comparable: Megatron-LM for WikiText and PTB, SEDD
# for the other texts.

_Rule = tuple[str, str]


def _apply(rules: Sequence[_Rule], text: str) -> str:
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return text


_WIKITEXT: list[_Rule] = [
    (r"s '", "s'"), (r"/' [0-9]/", r"/'[0-9]/"),
    (r" @-@ ", "-"), (r" @,@ ", ","), (r" @\.@ ", "."),
    (r" : ", ": "), (r" ; ", "; "), (r" \. ", ". "), (r" ! ", "! "), (r" \? ", "? "), (r" , ", ", "),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="), (r"= = =", "==="), (r"= =", "=="), (r" ° ", "°"),
    (r" \n", "\n"), (r"\n ", "\n"), (r" N ", " 1 "), (r" 's", "'s"),
]  # fmt: skip

_PTB: list[_Rule] = [
    (r" 's", "'s"), (r"s ' ", "s' "), (r" n't", "n't"), (r" \n ", "\n"), (r"\\/", "/"),
    (r" N(?= )", " 1"), (r"\$ 1", "$1"), (r"# 1", "#1"), (r"<unk>", "?"),
]  # fmt: skip

_LM1B: list[_Rule] = [
    (r"http : / / ", "http://"), (r"https : / / ", "https://"),
    (r" '(\w+)", r"'\1"), (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1."),
    (r" \? ", "? "), (r" \?$", "?"), (r" ! ", "! "), (r" !$", "!"),
    (r" , ", ", "), (r" : ", ": "), (r" ; ", "; "), (r" / ", "/"),
    (r"\" ([^\"]+) \"", r'"\1"'), (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^\(\)]+) \)", r"(\1)"), (r"\[ ([^\[\]]+) \]", r"[\1]"), (r"\$ ", "$"), (r"£ ", "£"),
]  # fmt: skip

DETOKENISERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "wikitext": lambda text: _apply(_WIKITEXT, text),
    "ptb": lambda text: _apply(_PTB, text),
    "lm1b": lambda text: _apply(_LM1B, text),
    "lambada": lambda text: "\n" + text.replace("\u201c", '"').replace("\u201d", '"').strip(),
    "scientific": lambda text: _apply(_LM1B, _apply(_WIKITEXT, text)),
}
"""Functions that undo the word splitting of a text."""
