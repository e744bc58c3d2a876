"""Forms of csv files, the options that follow MDLM's code, and encoding by the tokenizer's own library."""

import json
import random

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError
from armd_scale.evaluation import suites
from armd_scale.evaluation.models import open_model
from armd_scale.evaluation.suites import SETS, Protocol
from tests.conftest import PAPER, model_folder, run_tool

WORDS = "the quick brown fox jumps over the lazy dog and runs away from it\n" * 30
ROWS = '"3","First","things first."\n"4","Then","the rest, too."\n'
TEXTS = ["First things first.", "Then the rest, too."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers.train([WORDS], tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 290)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(ROWS, id="no-names"),
        pytest.param('"Class Index","Title","Description"\n' + ROWS, id="known-names"),
        pytest.param("a,b,c\n" + ROWS, id="unknown-names"),
        pytest.param('label,text\n3,First things first.\n\n4,"Then the rest, too."\n', id="text"),
        pytest.param('Text,Label\nFirst things first.,3\n"Then the rest, too.",4\n', id="capitals"),
    ],
)
def test_csv_files(tmp_path, mark, content):
    path = tmp_path / "test.csv"
    path.write_text(mark + content, encoding="utf-8", newline="\r\n")
    assert suites.read(SETS["AG News"], path, Protocol()) == (TEXTS, sum(map(len, TEXTS)))


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "ptb.test.txt"
    path.write_text("\ufeffhe said\n", encoding="utf-8")
    assert suites.read(SETS["PTB"], path, Protocol()) == (["he said"], 7)


def test_blocks_of_mdlm(tokenizer):
    rows = ["the lazy dog", "jumps over the quick brown fox"]
    tokens = [token for row in rows for token in [*tokenizer.encode(row), tokenizer.eos_id]]
    chunks, share = suites.chunks(rows, tokenizer, 8, Protocol(blocks="mdlm"))
    assert share == pytest.approx(6 * len(chunks) / len(tokens))
    for number, chunk in enumerate(chunks):
        assert chunk.tolist() == [*tokens[6 * number : 6 * number + 6], tokenizer.eos_id]
    assert len(tokens) - 6 * len(chunks) < 6
    with pytest.raises(UserError, match="less than a block of 98"):
        suites.chunks(rows, tokenizer, 100, Protocol(blocks="mdlm"))


@pytest.mark.parametrize(
    ("name", "options", "split"),
    [
        ("WikiText2", {}, "test"),
        ("WikiText2", {"splits": "mdlm"}, "validation"),
        ("WikiText2", {"splits": "mdlm", "wikitext2_split": "train"}, "train"),
        ("WikiText103", {"splits": "mdlm"}, "validation"),
        ("PTB", {"splits": "mdlm"}, "validation"),
        ("Scientific abstracts", {"splits": "mdlm"}, "validation"),
        ("LAMBADA", {"splits": "mdlm"}, "test"),
        ("1BW", {"splits": "mdlm"}, "test"),
        ("AG News", {"splits": "mdlm"}, "test"),
    ],
)
def test_splits(name, options, split, tmp_path):
    protocol = Protocol(**options)
    assert protocol.split(SETS[name]) == split
    for file in SETS[name].files_of(split):
        (tmp_path / file).touch()
    assert suites.find(SETS[name], tmp_path, split) == tmp_path / SETS[name].files_of(split)[0]


def test_wikitext_shares_its_validation_file(tmp_path):
    (tmp_path / "wiki.valid.raw").touch()
    assert suites.find(SETS["WikiText103"], tmp_path, "validation") == tmp_path / "wiki.valid.raw"


@pytest.mark.parametrize("field", ["abstract", "article"])
def test_fields_of_scientific_papers(tmp_path, field):
    path = tmp_path / "scientific_papers_test.jsonl"
    path.write_text(json.dumps({"abstract": "the abstract", "article": "the article"}) + "\n")
    assert suites.read(SETS["Scientific abstracts"], path, Protocol(scientific_field=field))[0] == [f"the {field}"]


def test_the_command_says_what_differs(tokenizer, tmp_path):
    folder, data = tmp_path / "model", tmp_path / "data"
    folder.mkdir()
    data.mkdir()
    model_folder(folder, PAPER, tokenizer)
    (data / "ptb.valid.txt").write_text(WORDS)
    words = ["--suite", "zeroshot", "--data", data, "--splits", "mdlm", "--blocks", "mdlm", "--processes", 1]
    done = run_tool("tools/eval_zeroshot.py", folder, *words)
    assert done.returncode == 0, done.stderr
    for line in ("ptb.valid.txt", "BOS + (length - 2) + EOS", "The code of MDLM differs", "LAMBADA: not in"):
        assert line in done.stdout


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A tokenizer with pieces ``0`` and ``00`` but without ``000``, which has two best paths; texts with ``000``."""
    folder, draw = tmp_path_factory.mktemp("numbers"), random.Random(0)
    trained = tokenizers.train([WORDS + "0 0 0\n" * 9], folder / "trained.model", 291)
    model = sentencepiece_model_pb2.ModelProto.FromString(trained.path.read_bytes())
    longest = max((piece for piece in model.pieces if piece.type == piece.NORMAL), key=lambda piece: len(piece.piece))
    longest.piece, longest.score = "00", -3.3
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    texts = [" ".join(f"{word}000" for word in draw.choices(WORDS.split(), k=30)) for _ in range(100)]
    return tokenizers.load(folder / "tokenizer.model"), texts


def test_evaluations_encode_by_the_library(numbers, tmp_path):
    by_segments, texts = numbers
    library = sentencepiece.SentencePieceProcessor(model_file=str(by_segments.path)).encode(texts)
    model_folder(tmp_path, PAPER, by_segments)
    tokenizer = open_model(tmp_path)[1]
    assert [tokens.tolist() for tokens in tokenizer.encode_batch(texts)] == library
    assert [tokens.tolist() for tokens in by_segments.encode_batch(texts)] != library, "no tie in these texts"
    odd = "1 \u2581 2"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd
