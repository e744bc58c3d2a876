"""The share of text that is held out, of many documents, of few, and of one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import holdout


def share(rule, texts):
    return sum(len(rule.split(text)[1]) for text in texts) / sum(map(len, texts))


@given(
    st.lists(st.text(alphabet="ab \n", min_size=1, max_size=60), min_size=1, max_size=50, unique=True),
    st.floats(0.01, 0.5),
)
def test_the_share_of_few_documents(texts, fraction):
    rule = holdout.plan(texts, fraction)
    parts = [rule.split(text) for text in texts]
    assert ["".join(part) for part in parts] == texts
    if not rule.tail:
        assert fraction / 2 <= share(rule, texts) <= fraction * 2
        assert all("" in part for part in parts), "documents stay whole"


@pytest.mark.parametrize("fraction", [0.02, 0.2])
def test_one_file_gives_its_tail(fraction):
    text = "".join(f"line {n}\n" for n in range(10_000))
    training, heldout = holdout.plan([text], fraction).split(text)
    assert training + heldout == text
    assert training.endswith("\n"), "the cut is at the end of a line"
    assert len(heldout) / len(text) == pytest.approx(fraction, rel=0.01)


def test_one_of_four_files_for_a_fifth():
    texts = [f"{n} {'text ' * 1000}" for n in range(4)]
    rule = holdout.plan(texts, 0.2)
    assert sorted(bool(rule.split(text)[1]) for text in texts) == [False, False, False, True]


def test_many_documents_go_by_their_hashes_alone():
    texts = [f"document {n}" for n in range(3000)]
    rule = holdout.plan(texts, 0.02)
    assert rule == holdout.Rule(int(0.02 * 2**64) + 1, 0.0) or rule.below == pytest.approx(0.02 * 2**64)
    assert share(rule, texts) == pytest.approx(0.02, rel=0.5)


def test_nothing_is_held_out_if_nothing_is_asked_for():
    assert holdout.plan(["one", "two"], 0.0).split("one") == ("one", "")
