"""The zero-shot suite: how its texts are read and detokenised, last words, and the command over processes."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from armd_scale import inference
from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError
from armd_scale.evaluation import accuracy, suites
from armd_scale.evaluation.models import alone
from armd_scale.files import sha256
from tests.conftest import BASELINES, PAPER, model_folder, run_tool, shared_data

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the quick brown fox jumps over the lazy dog and runs away from it\n" * 30


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers.train([WORDS], tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 290)


@pytest.fixture(scope="module", params=["armd", "mdm"])
def model_dir(request, tmp_path_factory, tokenizer):
    shape = PAPER if request.param == "armd" else BASELINES[request.param]
    return model_folder(tmp_path_factory.mktemp(request.param), shape, tokenizer)


def command(*words):
    done = run_tool("tools/eval_zeroshot.py", *words)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("wikitext", " = Robert Boulter = \n", " = Robert Boulter =\n"),
        ("wikitext", ' guest @-@ starring in " The Bill " ( 2000 ) , 1 @,@ 000 times . \n',
         ' guest-starring in "The Bill" (2000), 1,000 times.\n'),
        ("ptb", "he does n't pay N N of $ N for the firm 's <unk>", "he doesn't pay 1 1 of $1 for the firm's ?"),
        ("lm1b", "That 's it , he said : \" We ( all ) in . \" Is it ?", 'That\'s it, he said: "We (all) in." Is it?'),
        ("lambada", " \u201cYes,\u201d he said ", '\n"Yes," he said'),
        ("none", " as it is ", " as it is "),
    ],
)  # fmt: skip
def test_detokenisers(kind, text, expected):
    assert suites.DETOKENISERS[kind](text) == expected


ROWS = ["First things first.", "Then \u00e9 the rest, in two parts."]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The same records as lines, jsonl, parquet, and csv with and without names."""
    folder = tmp_path_factory.mktemp("forms")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS), encoding="utf-8")
    pq.write_table(pa.table({"text": ROWS}), folder / "a.parquet")
    (folder / "a.txt").write_text("\n".join(ROWS) + "\n", encoding="utf-8")
    for name, head in (("named.csv", [["label", "text"]]), ("bare.csv", [])):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(head + [["3", row] if head else ["3", *row.split(" ", 1)] for row in ROWS])
    return folder


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt", "named.csv", "bare.csv"])
def test_every_form_of_a_file(forms, name):
    documents, size = suites.read(suites.SETS["AG News"], forms / name, suites.Protocol())
    assert documents == ROWS
    assert size == sum(len(row.encode()) for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        pytest.param("b.jsonl", '{"body": "x"}\n', "none of the fields text", id="other-fields"),
        pytest.param("c.txt", "\n\n", "holds no text", id="empty-lines"),
    ],
)
def test_files_without_text(tmp_path, name, content, line):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=line):
        suites.read(suites.SETS["AG News"], tmp_path / name, suites.Protocol())


def test_protocol(tokenizer):
    """EOS behind each document, chunks over their edges, each switch on its own."""
    rows = ["the lazy dog", "", "jumps over the quick brown fox"]
    tokens = [token for row in rows for token in [*tokenizer.encode(row), tokenizer.eos_id]]
    chunks, share = suites.chunks(rows, tokenizer, 5, suites.Protocol())
    assert share == 1
    assert [token for chunk in chunks for token in chunk.tolist()] == tokens
    assert {len(chunk) for chunk in chunks[:-1]} == {5}
    bare, _ = suites.chunks(rows, tokenizer, 5, suites.Protocol(eos=False, length=3))
    assert sum(map(len, bare)) == len(tokens) - 3
    assert {len(chunk) for chunk in bare[:-1]} == {3}
    raw = suites.Protocol(detokenise=False)
    assert str(raw) != str(suites.Protocol())
    assert "train split" in str(suites.Protocol(wikitext2_split="train"))


def test_the_files_of_the_table():
    """The published files have the hashes that the table gives, and WikiText103 is tested on those of WikiText2."""
    folder = shared_data("zeroshot")
    found = {name: suites.find(text, folder) for name, text in suites.SETS.items()}
    for name, path in found.items():
        if path is not None:
            assert sha256(path) in suites.SETS[name].sha256
    assert found["WikiText103"] == found["WikiText2"]
    documents, _ = suites.read(suites.SETS["WikiText2"], found["WikiText2"], suites.Protocol())
    assert len(documents) == 2891
    assert "@-@" not in "".join(documents)
    assert "\r" not in "".join(documents)
    assert all(document.endswith("\n") and not document.endswith(" \n") for document in documents)


def test_last_words(tokenizer, model_dir):
    """Right when every token of the last word is the likeliest one after the true ones before it."""
    model = inference.load(model_dir)
    passages = ["the fox", "a lazy dog", "over it", "word"]
    found = accuracy.last_words(alone(model), tokenizer, passages, 16)
    assert found.passages == 3
    expected = 0
    for passage in passages[:3]:
        context = passage.rpartition(" ")[0]
        whole, start = tokenizer.encode(passage), len(tokenizer.encode(context))
        text = whole[:start]
        while len(text) < len(whole):  # one greedy token at a time
            left = [inference.FREE] * (len(whole) - len(text))
            decoding, order = inference.Decoding(temperature=0), range(len(text) + 1, len(whole) + 1)
            [filled] = model.complete(model.plan([text + left], decoding, 0, order))
            text.append(int(filled[len(text)]))
        expected += text == whole
    assert found.right == expected
    assert found.se == pytest.approx((found.value * (1 - found.value) / 3) ** 0.5)


def test_no_passage_has_a_last_word(tokenizer, model_dir):
    with pytest.raises(UserError, match="no passage"):
        accuracy.last_words(alone(inference.load(model_dir)), tokenizer, ["word"], 16)


def test_the_suite_by_the_command(model_dir, tmp_path):
    """All that is there, beside the paper's rows; the same figures on one process and on two, to the last bit."""
    data = tmp_path / "data"
    data.mkdir()
    lines = WORDS.splitlines()
    (data / "lambada_test.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:9]))
    (data / "ptb.test.txt").write_text("\n".join(lines[:30]) + "\n")
    answers = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        done = command(model_dir, "--suite", "zeroshot", "--data", data, "--json", out, "--processes", processes)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(out.read_text()))
    assert answers[0] == answers[1]
    for words in (
        "paper: ARMD small",
        "AG News: not in",
        "not the file of the table",
        "last word:",
        "no sliding window",
    ):
        assert words in done.stdout, words
    objective = inference.load(model_dir).config.objective
    kinds = {"armd": ["left-to-right", "shuffled:8", "strided:4"], "mdm": ["bound"]}[objective]
    assert [row["order"] for row in answers[0]["results"]] == kinds * 2
    assert answers[0]["protocol"]["detokenise"] is True


@pytest.mark.parametrize(
    ("words", "line"),
    [
        pytest.param(["--suite", "zeroshot"], "needs --data", id="no-data"),
        pytest.param(["--suite", "zeroshot", "--data", "/nowhere"], "/nowhere", id="absent-data"),
        pytest.param(["--suite", "zeroshot", "--data", "."], "docs/howto/evaluation.md", id="no-file-of-the-suite"),
        pytest.param(["--text", "README.md", "--length", "99"], "--length", id="long-chunks"),
        pytest.param(["--text", "README.md", "--repeats", "1"], "at least 2", id="one-repeat"),
    ],
)
def test_refusals(tmp_path_factory, tokenizer, words, line):
    folder = model_folder(tmp_path_factory.mktemp("m"), PAPER, tokenizer)
    done = command(folder, *words)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
