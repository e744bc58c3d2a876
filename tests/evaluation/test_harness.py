"""The harness's own command on local tasks, against figures worked out by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from armd_scale import inference
from armd_scale.data import tokenizer as tokenizers
from armd_scale.inference import FREE, Decoding
from tests.conftest import PAPER, model_folder

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the quick brown fox jumps over the lazy dog and runs away from it\n" * 30
CHOICES = [
    {"question": "the quick brown", "choices": [" fox", " dog", " it runs"], "answer": 0},
    {"question": "jumps over the lazy", "choices": [" dog", " fox"], "answer": 0},
    {"question": "", "choices": ["the", "runs away"], "answer": 1},
]
TEXTS = [{"text": "the lazy dog"}, {"text": "runs away from it\n" * 12}]
TASKS = {
    "own_choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
                   "doc_to_target": "{{answer}}", "target_delimiter": "",
                   "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]},
    "own_text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                 "metric_list": [{"metric": "bits_per_byte"}]},
    "own_until": {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "x",
                  "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
                  "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    place = tmp_path_factory.mktemp("harness")
    tokenizer = tokenizers.train([WORDS], place / "tokenizer.model", 290)
    (place / "model").mkdir()
    model = model_folder(place / "model", PAPER.model_copy(update={"length": 24}), tokenizer)
    for name, task in TASKS.items():
        rows = CHOICES if name == "own_choice" else TEXTS
        data = place / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (place / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))
    command = [
        sys.executable, "tools/eval_harness.py", "run", "--model", "armd", "--model_args", f"pretrained={model}",
        "--tasks", *TASKS, "--include_path", place, "--output_path", place / "out", "--log_samples",
        "--batch_size", "auto", "--trust_remote_code",
    ]  # fmt: skip
    env = {**os.environ, "HF_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    [summary] = (place / "out").rglob("results_*.json")
    samples = {
        name: sorted(
            map(json.loads, next((place / "out").rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()),
            key=lambda one: one["doc_id"],
        )
        for name in TASKS
    }
    return inference.load(model), tokenizer, json.loads(summary.read_text())["results"], samples


def test_multiple_choice(results):
    model, tokenizer, figures, samples = results
    right = 0
    for row, sample in zip(CHOICES, samples["own_choice"], strict=True):
        scores = []
        for choice, answer in zip(row["choices"], sample["filtered_resps"], strict=True):
            whole, before = tokenizer.encode(row["question"] + choice), tokenizer.encode(row["question"])
            nll = model.nll(torch.tensor([whole]))[0, len(before) :].sum()
            likeliest = model.logits(torch.tensor([whole]))[0, len(before) :].argmax(-1).tolist()
            assert float(answer[0]) == pytest.approx(-float(nll), abs=1e-4)
            assert str(answer[1]) == str(likeliest == whole[len(before) :])
            scores.append(-float(nll))
        right += scores.index(max(scores)) == row["answer"]
    assert figures["own_choice"]["acc,none"] == pytest.approx(right / len(CHOICES))


def test_rolling(results):
    """The first window begins at BOS; each later one has the last token before it as context."""
    model, tokenizer, figures, _ = results
    total = size = 0.0
    for row in TEXTS:
        tokens = tokenizer.encode(row["text"])
        length = model.config.length - 1
        first, rest = tokens[:length], tokens[length:]
        total += float(model.nll(torch.tensor([first])).sum())
        at = length
        while rest:
            part, rest = rest[:length], rest[length:]
            context = tokens[max(0, at + len(part) - length - 1) : at]
            scores = model.nll(torch.tensor([[*context, *part]]))[0]
            total += float(scores[len(context) :].sum())
            at += len(part)
        size += len(row["text"].encode())
    assert figures["own_text"]["bits_per_byte,none"] == pytest.approx(total / size / 0.6931471805599453, rel=1e-4)


def test_generate_until(results):
    model, tokenizer, _, samples = results
    for row, sample in zip(TEXTS, samples["own_until"], strict=True):
        prompt = tokenizer.encode(row["text"])[-(model.config.length - 6) :]
        [task] = model.plan([prompt + [FREE] * 6], Decoding(temperature=0, stop=True))
        text = tokenizer.decode(model.complete([task])[0].tolist())[len(tokenizer.decode(prompt)) :]
        assert sample["resps"][0][0] == text.split("\n")[0]
