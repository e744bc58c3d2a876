"""The text that a tokenizer is trained on."""

import pytest

from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError
from data_pipeline import holdout, train_tokenizer


def test_small_text_is_used_as_a_whole(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n\n\ntwo\nlines\n\n")
    (tmp_path / "b.txt").write_text("three")
    assert list(train_tokenizer.sample([f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"])) == [
        "one\n",
        "two\nlines\n",
        "three\n",
    ]


@pytest.mark.parametrize("most", [4, 1000], ids=["drawn-parts", "all-parts"])
def test_all_files_of_a_large_corpus_are_sampled(tmp_path, monkeypatch, most):
    monkeypatch.setattr(train_tokenizer, "_SAMPLE", 4000)
    monkeypatch.setattr(train_tokenizer, "_PARTS", most)
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * 10_000 * (1 + 3 * (number == 5)))
    names = [f"{tmp_path}/{number}.txt" for number in range(8)]
    text = "".join(train_tokenizer.sample(names)).replace("\n", "")
    assert len(text) == pytest.approx(4000, abs=10)
    assert len(set(text)) >= min(most, 8)
    assert text.count("5") >= 1000, "a large file gives more"


def test_held_out_text_is_left_out(tmp_path):
    text = "".join(f"{n}\n\n" for n in range(100))
    (tmp_path / "a.txt").write_text(text)
    sample = list(train_tokenizer.sample([f"{tmp_path}/a.txt"], rule=holdout.Rule(0, 0.5)))
    assert "0\n" in sample
    assert "99\n" not in sample


def test_a_text_without_blank_lines(tmp_path):
    """Sentencepiece passes over lines of more than a megabyte."""
    greek = "\u03ba\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1 \u03ba\u03cc\u03c3\u03bc\u03b5 "
    (tmp_path / "greek.txt").write_text(greek * 60_000, encoding="utf-8")
    (tmp_path / "latin.txt").write_text("some words\n\n" * 100)
    lines = train_tokenizer.sample([f"{tmp_path}/greek.txt", f"{tmp_path}/latin.txt"])
    tokenizer = tokenizers.train(lines, tmp_path / "t.model", 300)
    assert len(tokenizer.encode(greek)) < 12


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"content": "a"}\n', "x.jsonl line 1 .*text"),
        (b"<html>404 Not Found</html>\n", "x.jsonl line 1"),
        ("\u00e9\n".encode("latin-1"), "x.jsonl line 1 "),
        (b'{"text": "  "}\n', "all documents are empty"),
        (b"", "all documents are empty"),
    ],
)
def test_files_without_usable_text(tmp_path, content, line):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"there is no text to train a tokenizer on: .*{line}"):
        list(train_tokenizer.sample([str(tmp_path / "x.jsonl")]))


@pytest.mark.parametrize(
    ("pieces", "line"), [(5000, r"it gives at most \d+; give more text"), (260, r"alone are \d+; raise")]
)
def test_a_vocabulary_that_does_not_fit_the_text(tmp_path, pieces, line):
    with pytest.raises(UserError, match=line):
        tokenizers.train(["the cat sat on the mat\n"] * 9, tmp_path / "t.model", pieces)
