"""Quality of generated texts: both kinds of judge against their models, figures against definitions, the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from armd_scale import inference
from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError
from armd_scale.evaluation import generation
from armd_scale.training import manifest
from tests.conftest import PAPER, model_folder, run_tool, tiny_distribution

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the quick brown fox jumps over the lazy dog and runs away from it\n" * 30


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    tokenizer = tokenizers.train([WORDS], tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 290)
    return model_folder(tmp_path_factory.mktemp("model"), PAPER, tokenizer)


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory):
    """A tiny GPT-2 as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("gpt2")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({"<|endoftext|>": 0, **{c: i for i, c in enumerate(alphabet, 1)}}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end).save_pretrained(place)
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=257, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    GPT2LMHeadModel(shape).save_pretrained(place)
    return place


JUDGED = "the lazy dog runs away from the quick brown fox"


def test_a_model_as_judge(model_dir):
    """Every token once, in windows of the judge's length, BOS before each."""
    model, tokenizer = inference.load(model_dir), tokenizers.load(model_dir)
    tokens = tokenizer.encode(JUDGED)
    expected = sum(float(model.nll(torch.tensor([tokens[at : at + 16]])).sum()) for at in range(0, len(tokens), 16))
    [(nats, count), short] = generation.load_judge(model_dir).nll([JUDGED, "the"])
    assert short[1] == len(tokenizer.encode("the"))
    assert (nats, count) == (pytest.approx(expected, rel=1e-6), len(tokens))


def test_gpt2_as_judge(gpt2_dir):
    """As above, by the logits of transformers token by token."""
    from transformers import GPT2LMHeadModel

    judge = generation.load_judge(gpt2_dir)
    gpt2 = GPT2LMHeadModel.from_pretrained(gpt2_dir)
    ids = [judge._tokenizer.convert_tokens_to_ids("Ġ" if sign == " " else sign) for sign in JUDGED]
    expected = 0.0
    with torch.no_grad():
        for at in range(0, len(ids), 15):
            part = ids[at : at + 15]
            for place, token in enumerate(part):
                logits = gpt2(torch.tensor([[0, *part[:place]]])).logits[0, -1]
                expected -= float(logits.double().log_softmax(-1)[token])
    [(nats, count)] = judge.nll([JUDGED])
    assert (nats, count) == (pytest.approx(expected, rel=1e-5), len(JUDGED))


def test_a_folder_without_a_judge(model_dir):
    with pytest.raises(UserError, match="holds no judge"):
        generation.load_judge(model_dir / "nothing")


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory):
    """Runs beside each other: the best finished left-to-right one is b; c has another objective, d is unfinished."""
    folder = tmp_path_factory.mktemp("neighbours")
    runs = {"a": ("ar", 2.0, True), "b": ("ar", 1.5, True), "c": ("armd", 1.0, True), "d": ("ar", 1.2, False)}
    for name, (objective, score, finished) in runs.items():
        checkpoint = folder / name / "checkpoints" / "step-00000001"
        checkpoint.mkdir(parents=True)
        (folder / name / "config.yaml").write_text(f"objective: {objective}\n")
        line = {"step": 1, "heldout_left_to_right": score, "heldout_left_to_right_bits_per_byte": score}
        (folder / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        if finished:
            manifest.write(checkpoint, {"step": 1})
    return folder


@pytest.mark.parametrize("place", ["c", "c/checkpoints/step-00000001", "a"])
def test_the_judge_beside_a_model(neighbours, place):
    assert generation.find_judge(neighbours / place).name == "b"


def test_no_judge_beside_a_model(neighbours):
    with pytest.raises(UserError, match="no judge beside"):
        generation.find_judge(neighbours)


class _Fixed:
    name = "fixed"

    def nll(self, texts):
        return [(float(text.split()[0]), len(text.split())) for text in texts]


def test_figures():
    """Perplexity of all texts together with the error of a ratio; entropy and n-grams of single texts."""
    texts = ["2.0 a", "9.0 a b", "4.0 a b c", "1.0"]
    tokens = [[1, 1, 1, 1], [1, 2, 1, 2], [1, 2, 3, 4], [5, 5, 6, 6]]
    got = generation.quality(texts, tokens, _Fixed())
    nats, sizes = np.array([2.0, 9, 4, 1]), np.array([2.0, 3, 4, 1])
    assert got.perplexity == pytest.approx(math.exp(16 / 10))
    resampled = []
    random = np.random.default_rng(0)
    for _ in range(20_000):
        pick = random.integers(0, 4, 4)
        resampled.append(nats[pick].sum() / sizes[pick].sum())
    assert got.perplexity_se == pytest.approx(math.exp(1.6) * np.std(resampled), rel=0.3)
    entropies = [0.0, math.log(2), math.log(4), math.log(2)]
    assert got.entropy == pytest.approx(np.mean(entropies))
    assert got.entropy_se == pytest.approx(np.std(entropies) / 2)
    assert got.as_dict()["entropy_bits"] == pytest.approx(np.mean(entropies) / math.log(2))
    assert got.distinct_1 == pytest.approx(np.mean([1 / 4, 2 / 4, 1, 2 / 4]))
    assert got.distinct_2 == pytest.approx(np.mean([1 / 3, 2 / 3, 1, 1]))
    assert got.distinct_3 == pytest.approx(np.mean([1 / 2, 1, 1, 1]))


def test_nothing_to_judge():
    with pytest.raises(UserError, match="no text to judge"):
        generation.quality([""], [[1]], _Fixed())


def test_the_command(model_dir, tmp_path):
    out = [tmp_path / name for name in ("one.json", "two.json", "picture.png")]
    words = ["tools/eval_generation.py", model_dir, "--judge", model_dir, "--samples", 6]
    ways = ["streams=1", "streams=4", "draft=3", "streams=2,top_p=0.9"]
    words += ["--marginal-places", 3]
    for path, batch in ((out[0], 1), (out[1], 4)):
        more = ["--batch", batch, "--json", path, "--plot", out[2], "--ways", *ways]
        done = run_tool(*words, *more)
        assert done.returncode == 0, done.stderr
    first, second = (json.loads(path.read_text())["rows"] for path in out[:2])
    assert out[2].read_bytes()[:4] == b"\x89PNG"
    for one, other in zip(first, second, strict=True):  # the texts do not depend on the batch
        for field in ("perplexity", "entropy", "distinct_2", "texts"):
            assert one[field] == pytest.approx(other[field], rel=1e-4)
    ideal = json.loads(out[0].read_text())["marginal"]
    assert 0 < ideal["acceptance"] < 1
    assert "accepted at place 1 (3 places, 64 tokens each" in done.stdout
    assert [row["strategy"] for row in first] == ["strided", "strided", "exact", "strided"]
    assert first[0]["tokens_per_pass"] == 1
    assert first[1]["tokens_per_pass"] == pytest.approx(16 / 7)
    assert first[2]["tokens_per_pass"] >= 1


@pytest.mark.parametrize(
    ("way", "line"),
    [
        ("width=3", "unknown field 'width'"),
        ("streams=x", "'x' is not a number"),
        ("draft=-1", "draft must"),
        ("stop=1", "leave out stop"),
    ],
)
def test_ways_that_are_refused(model_dir, way, line):
    done = run_tool("tools/eval_generation.py", model_dir, "--judge", model_dir, "--samples", 6, "--ways", way)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert line in done.stderr


def test_tokens_of_a_pass_do_not_depend_on_the_batch():
    """A finished text that waits for the others of its batch makes no passes."""
    model = tiny_distribution(5, 12)
    alone, together = (generation.sample(model, inference.Decoding(draft=3), 6, 12, batch) for batch in (1, 6))
    assert alone.tokens == together.tokens
    assert 1 < alone.tokens_per_pass == together.tokens_per_pass


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_law_without_the_token_before_by_all_continuations(place):
    """1 - TV by enumeration: the law of the token after next, with and without the next one."""
    model, text = tiny_distribution(4, 6), [2, 1, 3]
    begin = text[:place]

    def law(tokens):
        return model.logits(torch.tensor([[*tokens, 0]]))[0, -1].softmax(-1)

    following = law(begin)
    behind = torch.stack([law([*begin, token]) for token in range(4)])
    without = following @ behind
    expected = float(1 - 0.5 * (following @ (behind - without).abs().sum(-1)))
    bounds = [
        generation.marginal_acceptance(model, [[2, 1, 3, 0]], 1, 4, seed) for seed in range(20)
    ]  # every place is drawn
    assert any(bound.acceptance == pytest.approx(expected, abs=1e-12) for bound in bounds)
    assert len({round(bound.acceptance, 9) for bound in bounds}) == 3
    assert all(bound.covered == pytest.approx(1) for bound in bounds)
    texts = model.generate(length=6, batch=400, seed=3)
    accepted, _ = generation.acceptance(model, texts.tolist())
    every = generation.marginal_acceptance(model, texts.tolist(), 200, 4)
    assert accepted[0] < every.acceptance + 3 * every.error
    part = generation.marginal_acceptance(model, texts.tolist(), 50, 2)
    assert part.covered < 1
