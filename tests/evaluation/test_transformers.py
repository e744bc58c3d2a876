"""Models of transformers are scored by the protocol of the project's own models."""

import json

import pytest
import transformers
from safetensors.torch import load_file, save_file

from armd_scale import inference
from armd_scale.errors import UserError
from armd_scale.evaluation import accuracy, likelihood, models
from tests.conftest import ROOT, run_tool
from tests.runs import PANGRAMS
from tests.training.test_pretrained import adopt, make


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of transformers, and the model that it became."""
    folder = tmp_path_factory.mktemp("models")
    make(folder / "theirs", "Qwen2ForCausalLM")
    adopt(folder / "theirs", folder / "run")
    done = run_tool(ROOT / "tools/convert_ckpt.py", f"{folder}/run", f"{folder}/ours")
    assert done.returncode == 0, done.stderr
    return folder / "theirs", folder / "ours"


def test_an_import_has_the_figures_of_its_parent(folders, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text(PANGRAMS)
    figures = []
    for folder in folders:
        options = ("--text", str(text), "--length", "31", "--order", "left-to-right", "--json", f"{tmp_path}/out.json")
        done = run_tool(ROOT / "tools/eval_zeroshot.py", str(folder), *options)
        assert done.returncode == 0, done.stderr
        [row] = json.loads((tmp_path / "out.json").read_text())["results"]
        figures.append(row)
    assert figures[0]["tokens"] == figures[1]["tokens"] > 62
    assert figures[0]["nll"] == pytest.approx(figures[1]["nll"], rel=1e-5)


def test_last_words_are_those_of_its_parent(folders):
    """Of passages whose last words one of them writes, both write the same."""
    (theirs, tokenizer), (ours, _) = map(models.open_scored, folders)
    passages = []
    for number in range(12):
        prompt = tokenizer.encode(f"{number} {PANGRAMS[:20]}")
        [written] = ours.generate([prompt], new_tokens=3, decoding=inference.Decoding(temperature=0))
        passages.append(tokenizer.decode(written.tolist()))
    found = [accuracy.last_words(models.alone(model), tokenizer, passages, 32) for model in (theirs, ours)]
    assert found[0] == found[1]
    assert found[0].right > 0


def test_other_orders_are_refused(folders):
    model, tokenizer = models.open_scored(folders[0])
    chunks = likelihood.cut(tokenizer.encode(PANGRAMS), 16)
    for order in ("infill", "strided:2", "groups:2", "bound"):
        with pytest.raises(UserError, match="leave out --order"):
            likelihood.score(models.alone(model), chunks, order, 1)


def _without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _shorter(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 200}))
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:200].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"), "is not a causal language model"),
        (_without_a_weight, "lacks weights that fit config.json, such as model.layers.1.mlp.down_proj.weight"),
        (_shorter, "has 300 entries but the model 200"),
    ],
)
def test_damaged_models_are_refused(tmp_path, damage, line):
    make(tmp_path / "theirs")
    damage(tmp_path / "theirs")
    with pytest.raises(UserError, match=line):
        models.open_scored(tmp_path / "theirs")


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    make(tmp_path / "theirs")  # for its tokenizer
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    settings = transformers.BertConfig(vocab_size=300, initializer_range=0.5, **sizes)
    transformers.BertLMHeadModel(settings).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert/tokenizer.model").write_bytes((tmp_path / "theirs/tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="a token changes what is predicted before it"):
        models.open_scored(tmp_path / "bert")
