"""The zero-shot suite: its texts, how they are read and detokenised, and published results.

Protocol (docs/howto/evaluation.md; SEDD arXiv 2310.16834, RADD 2406.03736): each text is detokenised
(``DETOKENISERS``), tokens + EOS of its documents are concatenated, and the tokens are split into chunks of the model's
length. The options of the protocol are the fields of ``Protocol``; they include what the code of MDLM (2406.07524) does
otherwise.
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
    splits: str = "test"
    """``mdlm``: the validation split where MDLM's code scores it (WikiText, PTB, scientific papers)."""
    blocks: str = "chunks"
    """``mdlm``: blocks of BOS, length - 2 tokens and EOS, without the last partial block, as in MDLM's code."""
    scientific_field: str = "abstract"
    """``article``: the text of scientific papers that MDLM's code scores."""

    def split(self, text: "TextSet") -> str:
        """The split of a text that is scored."""
        if text.name == "WikiText2" and self.wikitext2_split != "test":
            return self.wikitext2_split
        return "validation" if self.splits == "mdlm" and text.validation_files else "test"

    def fields(self, text: "TextSet") -> tuple[str, ...]:
        """Fields of a record that may hold the text, in the order of preference."""
        return tuple(self.scientific_field if name == "abstract" else name for name in text.fields)

    def __str__(self) -> str:
        length = "the model's length" if self.length is None else f"{self.length} tokens"
        cut = f"cut into chunks of {length}; BOS before each chunk"
        last = "last partial chunk scored"
        if self.blocks == "mdlm":
            cut = f"cut into blocks of BOS + (length - 2) + EOS, of {length}"
            last = "last partial block dropped"
        return (
            f"documents {'detokenised' if self.detokenise else 'as stored'}, blank ones left out, "
            f"tokens{' + EOS' if self.eos else ''}, "
            f"concatenated, {cut}, every token scored, no sliding window, "
            f"{last}; WikiText2 {self.split(SETS['WikiText2'])} split; other texts: {self.splits} splits; "
            f"{self.scientific_field} of scientific papers"
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
    """Field of a record that holds the text, or columns to join, by name or by number (``title+description``)."""
    detokeniser: str
    hub: tuple[str, str | None]
    """Path and configuration for ``datasets``."""
    train_files: tuple[str, ...] = ()
    """File names of the training split, where a published figure uses it."""
    validation_files: tuple[str, ...] = ()
    """File names of the validation split, where MDLM's code scores it."""

    def files_of(self, split: str) -> tuple[str, ...]:
        """File names of a split: ``test``, ``train`` or ``validation``."""
        return {"test": self.files, "train": self.train_files, "validation": self.validation_files}[split]


SETS = {
    text.name: text
    for text in (
        TextSet(
            "LAMBADA",
            ("lambada_test.jsonl", "lambada.jsonl"),
            ("4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",),
            ("text",),
            "lambada",
            ("EleutherAI/lambada_openai", "default"),
        ),
        TextSet(
            "WikiText2",
            ("wikitext2_raw_test.txt", "wiki.test.raw", "wikitext2.parquet"),
            ("4f3e427e4aff23acff917a8a51aeae21bf12832256e26914c8fc250dcef4103c",),
            ("text",),
            "wikitext",
            ("Salesforce/wikitext", "wikitext-2-raw-v1"),
            ("wikitext2_raw_train.txt", "wiki.train.raw"),
            ("wikitext2_raw_validation.txt", "wiki.valid.raw"),
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
            ("ptb-text-only/ptb_text_only", None),
            validation_files=("ptb.valid.txt", "ptb_valid.txt"),
        ),
        TextSet(
            "WikiText103",
            ("wikitext103_raw_test.txt", "wikitext103.parquet"),
            ("4f3e427e4aff23acff917a8a51aeae21bf12832256e26914c8fc250dcef4103c",),
            ("text",),
            "wikitext",
            ("Salesforce/wikitext", "wikitext-103-raw-v1"),
            validation_files=("wikitext103_raw_validation.txt",),
        ),
        TextSet(
            "1BW",
            ("lm1b_heldout_00000.txt", "lm1b_test.txt", "news.en.heldout-00000-of-00050"),
            ("265dccd51762253e20425c21ff6ddf09e6da2e11a365da399b0390eebb2d52c8",),
            ("text",),
            "lm1b",
            ("billion-word-benchmark/lm1b", "plain_text"),
        ),
        TextSet(
            "AG News",
            ("ag_news_test.csv", "test.csv", "ag_news.jsonl", "ag_news.parquet"),
            ("521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699",),
            ("text", "title+description", "2+3"),
            "none",
            ("fancyzhx/ag_news", "default"),
        ),
        TextSet(
            "Scientific abstracts",
            ("scientific_papers_test.jsonl", "scientific_papers.parquet", "abstracts.jsonl", "abstracts.txt"),
            (),
            ("abstract", "text"),
            "scientific",
            ("armanc/scientific_papers", "arxiv"),
            validation_files=("scientific_papers_validation.jsonl", "scientific_papers_validation.parquet"),
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


COMPARISON = """\
The code of MDLM differs from the default protocol: it scores validation splits of WikiText, PTB and scientific papers
(--splits mdlm), articles instead of abstracts (--scientific-field article), and blocks of BOS + (L - 2) + EOS
(--blocks mdlm)."""
"""What to know when the columns are compared with those of MDLM (github.com/kuleshov-group/mdlm, dataloader.py)."""


def find(text: TextSet, folder: Path, split: str = "test") -> Path | None:
    """The file of a split of a text in a directory; None if it does not exist.

    WikiText103 and WikiText2 have the same test and validation articles and can share a file.
    """
    names = text.files_of(split)
    if text.name == "WikiText103":
        names = (*names, *SETS["WikiText2"].files_of(split))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read(text: TextSet, path: Path, protocol: Protocol) -> tuple[list[str], int]:
    """Documents of a text as the protocol scores them, and their number of UTF-8 bytes. Raises ``UserError``."""
    return _prepared(text, _records(text, path, protocol.fields(text)), protocol, str(path))


def read_hub(text: TextSet, protocol: Protocol) -> tuple[list[str], int]:
    """``read`` from a hub of data sets; ``UserError`` if the hub cannot be reached."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("datasets is not installed: pip install -c constraints.txt -e '.[eval]'") from error
    path, name = text.hub
    split, fields = protocol.split(text), protocol.fields(text)
    try:
        rows = load_dataset(path, name, split=split)
    except Exception as error:  # network, proxy, access rights, format
        raise UserError(f"{text.name} cannot be read from {path}: {error}; name a directory with --data") from error
    return _prepared(text, (_field(row, fields, path) for row in rows), protocol, path)


def chunks(
    documents: Sequence[str], tokenizer: Tokenizer, length: int, protocol: Protocol
) -> tuple[list[np.ndarray], float]:
    """Tokenise documents and split the tokens into chunks; returns them and the share of the tokens that they hold.

    Raises ``UserError`` if the text is shorter than a block of MDLM.
    """
    end = np.array([tokenizer.eos_id], dtype=np.int64)
    encoded = [np.asarray(tokens, dtype=np.int64) for tokens in tokenizer.encode_batch(list(documents))]
    joined = np.concatenate([part for tokens in encoded for part in (tokens, end[: protocol.eos])])
    length = protocol.length or length
    if protocol.blocks != "mdlm":
        return cut(joined, length), 1.0
    size = length - 2
    whole = len(joined) // size * size
    if not whole:
        raise UserError(f"the text has {len(joined)} tokens, less than a block of {size}: leave out --blocks mdlm")
    return [np.concatenate([block, end]) for block in cut(joined[:whole], size)], whole / len(joined)


def _prepared(text: TextSet, records: Iterator[str], protocol: Protocol, where: str) -> tuple[list[str], int]:
    detokenise = DETOKENISERS[text.detokeniser] if protocol.detokenise else str
    documents = [detokenise(record) for record in records if record.strip()]
    size = sum(len(document.encode("utf-8", "surrogatepass")) for document in documents)
    if not size:
        raise UserError(f"{where} holds no text: check the file")
    return documents, size


def _records(text: TextSet, path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    """Texts of the records of a file. Lines of WikiText keep their line ends, as in the published data sets."""
    if path.suffix == ".csv":
        yield from _csv_records(path, fields)
    elif path.suffix in (".jsonl", ".parquet"):
        field = next((name for name in fields if _has(path, name)), None)
        if field is None:
            raise UserError(f"{path} has none of the fields {', '.join(fields)}: rename a field")
        yield from readers.documents([str(path)], field)
    else:
        try:
            with path.open(encoding="utf-8-sig", newline="\n") as file:
                for line in file:
                    yield line.replace("\r\n", "\n") if text.detokeniser == "wikitext" else line.strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}") from error


def _csv_records(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    """Texts of the rows of a csv file, with or without a row of column names."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as csv in UTF-8: {error}") from error
    names = [name.strip().lower() for name in rows[0]] if rows else []
    named = any(set(field.split("+")) <= set(names) for field in fields)
    # In a file without names, the first column is a number: the class.
    headed = named or (len(rows) > 1 and rows[1][0].isdigit() and not rows[0][0].isdigit())
    for row in rows[headed:]:
        yield _field(dict(zip(names, row, strict=False)) if named else dict(enumerate(row, 1)), fields, str(path))


def _has(path: Path, field: str) -> bool:
    try:
        return next(iter(readers.documents([str(path)], field)), None) is not None
    except UserError:
        return False


def _field(row: dict[Any, Any], fields: tuple[str, ...], where: str) -> str:
    """The text of a record: a field, or joined columns ``a+b``."""
    for name in fields:
        columns: list[Any] = [int(part) if part.isdigit() else part for part in name.split("+")]
        if all(column in row for column in columns):
            return " ".join(str(row[column]) for column in columns)
    raise UserError(f"{where}: a record has none of the fields {', '.join(fields)}: rename a field")


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
