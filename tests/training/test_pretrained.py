"""Models of transformers as runs, and left-to-right runs as models of transformers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from armd_scale import config as configs
from armd_scale import config_files, inference
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.shards import PackedDataset, fill_vocabulary
from armd_scale.decoding import network
from armd_scale.errors import UserError
from armd_scale.inference import Decoding
from armd_scale.model.network import is_adapter
from armd_scale.run_directory import RunDirectory
from armd_scale.training import architectures, export, pretrained
from armd_scale.training.samples import Samples
from data_pipeline import prepare
from tests import runs
from tests.conftest import ROOT, run_armd, run_tool

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 300,
    "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0},
}


def make(folder, architecture="LlamaForCausalLM", rope="default", dtype=torch.float32, seed=0, **fields):
    """A small random model that transformers makes and writes."""
    torch.manual_seed(seed)
    kind = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    values = SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": False} | fields
    settings = kind(**values, rope_parameters={**ROPES[rope], "rope_theta": 5000.0})
    model = getattr(transformers, architecture)(settings).eval()
    for name, param in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(param, mean=float("norm" in name), std=0.3)
    model = model.to(dtype)
    model.save_pretrained(folder)
    shutil.copy(ROOT / "tests/fixtures/v0.1/armd/tokenizer.model", folder)
    return model


def adopt(model_dir, run_dir, *overrides):
    return pretrained.adopt(model_dir, run_dir, None, ["model.length=32", *overrides])


def standalone(run_dir, step=0):
    run = RunDirectory(run_dir)
    model, _ = export.in_memory(fill_vocabulary(config_files.load_run(run)), run.checkpoint(step))
    return model


def logits_left_to_right(model, tokens):
    """Logits [N, V] of every token of a text by a standalone model."""
    places = torch.arange(1, len(tokens) + 1)[None]
    return model.predict(model.whole(torch.tensor([tokens]), places, places))[0]


TOKENS = [5, 250, 17, 17, 3, 99, 123, 7, 201, 64, 5, 250, 18, 2, 44, 45, 46, 47, 48, 49]
FEATURES = st.fixed_dictionaries(
    {
        "architecture": st.sampled_from(sorted(architectures.ARCHITECTURES)),
        "rope": st.sampled_from(sorted(ROPES)),
        "tie_word_embeddings": st.booleans(),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([8, 12]),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-3]),
    }
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FEATURES, st.sampled_from(["ar", "armd"]), st.integers(1, 3))
def test_logits_are_those_of_transformers(tmp_path_factory, features, objective, two_stream):
    folder = tmp_path_factory.mktemp("model")
    if features["architecture"] == "Qwen2ForCausalLM":
        features = {**features, "head_dim": 8}  # derived there
    model = make(folder / "theirs", **features)
    given = ["model.two_stream_layers=" + str(two_stream)] if objective == "armd" else []
    adopt(folder / "theirs", folder / "run", f"objective={objective}", *given)
    ours = standalone(folder / "run")
    with torch.no_grad():
        expected = model(torch.tensor([[ours.config.bos_id, *TOKENS[:-1]]])).logits[0]
        got = logits_left_to_right(ours, TOKENS)
    assert float((got - expected).abs().max()) < 1e-4
    if objective == "ar" and features["architecture"] != "MistralForCausalLM":
        _round_trip(folder)


def test_rotary_scaling_extends_a_model(tmp_path):
    """The extended model computes what transformers computes with the same scaling; more positions need a factor."""
    model = make(tmp_path / "theirs", "LlamaForCausalLM", "default")
    extended = ["model.rope.scaling=yarn", "model.rope.factor=3", "model.rope.high_turns=32"]
    pretrained.adopt(tmp_path / "theirs", tmp_path / "run", None, ["model.length=150", *extended])
    ours = standalone(tmp_path / "run")
    scaling = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64, "rope_theta": 5000.0}
    model.config.rope_parameters = scaling
    theirs = type(model)(model.config)
    theirs.load_state_dict(model.state_dict())
    tokens = [TOKENS[n % len(TOKENS)] for n in range(150)]
    with torch.no_grad():
        expected = theirs(torch.tensor([[ours.config.bos_id, *tokens[:-1]]])).logits[0]
        got = logits_left_to_right(ours, tokens)
    assert float((got - expected).abs().max()) < 1e-4
    with torch.no_grad():
        plain = model(torch.tensor([[ours.config.bos_id, *tokens[:-1]]])).logits[0]
    assert float((got - plain).abs().max()) > 1e-2
    with pytest.raises(UserError, match="model.length = 193 exceeds the 192 positions"):
        pretrained.adopt(tmp_path / "theirs", tmp_path / "other", None, ["model.length=193", *extended])


def _round_trip(folder):
    run = RunDirectory(folder / "run")
    config = fill_vocabulary(config_files.load_run(run))
    pretrained.write_folder(config, run.checkpoint(0), folder / "back", True, None, 10**9)
    before, after = (load_file(folder / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "back")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "theirs")
    tokens = torch.tensor([[1, *TOKENS]])
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_byte_for_byte(tmp_path, dtype):
    make(tmp_path / "theirs", dtype=dtype)
    adopt(tmp_path / "theirs", tmp_path / "run", "objective=ar")
    run = RunDirectory(tmp_path / "run")
    pretrained.write_folder(config_files.load_run(run), run.checkpoint(0), tmp_path / "back", True, None, 10**4)
    before = load_file(tmp_path / "theirs/model.safetensors")
    files = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())["weight_map"]
    assert files.keys() == before.keys()
    for name, file in files.items():
        assert torch.equal(load_file(tmp_path / "back" / file)[name], before[name])
    adopt(tmp_path / "back", tmp_path / "again", "objective=ar")


def test_greedy_texts_are_those_of_transformers(tmp_path):
    model = make(tmp_path / "theirs", "Qwen3ForCausalLM", "llama3", head_dim=12)
    adopt(tmp_path / "theirs", tmp_path / "run")
    ours = standalone(tmp_path / "run")
    prompt = TOKENS[:6]
    theirs = model.generate(
        torch.tensor([[ours.config.bos_id, *prompt]]),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=[],
        pad_token_id=0,
    )
    got = ours.generate([prompt], new_tokens=20, decoding=Decoding(temperature=0.0))
    assert got[0].tolist() == theirs[0, 1:].tolist()
    drafted = ours.generate([prompt], new_tokens=20, decoding=Decoding(temperature=0.0, draft=3))
    assert drafted[0].tolist() == theirs[0, 1:].tolist()


def _swapped(name):
    """The table with another tensor in the place of one."""
    tensors = architectures.tensors

    def wrong(model):
        pairs = tensors(model)
        for number, pair in enumerate(pairs):
            if name == "gate" and pair.name.endswith("mlp.up.weight"):
                pairs[number] = pair._replace(foreign=pair.foreign[::-1])
            if name == "key" and pair.name.endswith("key_value.weight"):
                pairs[number] = pair._replace(foreign=pair.foreign[::-1])
            if name == "heads" and pair.name.endswith("key_value.weight"):
                pairs[number] = pair._replace(size=pair.size * 2)
            if name == "pairs" and pair.name.endswith("key_value.weight"):
                pairs[number] = pair._replace(size=1)
        if name == "norms":
            first, second = (
                n for n, pair in enumerate(pairs) if pair.name.startswith("layers.1.") and "_norm.weight" in pair.name
            )
            pairs[first], pairs[second] = (
                pairs[first]._replace(foreign=pairs[second].foreign),
                pairs[second]._replace(foreign=pairs[first].foreign),
            )
        return pairs

    return wrong


@pytest.mark.parametrize("name", ["gate", "key", "heads", "pairs", "norms"])
def test_a_wrong_table_gives_other_logits(tmp_path, monkeypatch, name):
    model = make(tmp_path / "theirs")
    monkeypatch.setattr(architectures, "tensors", _swapped(name))
    adopt(tmp_path / "theirs", tmp_path / "run", "objective=ar")
    ours = standalone(tmp_path / "run")
    with torch.no_grad():
        expected = model(torch.tensor([[ours.config.bos_id, *TOKENS[:-1]]])).logits[0]
    assert float((logits_left_to_right(ours, TOKENS) - expected).abs().max()) > 1e-2


def _edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _nan(weights):
    weights["model.layers.2.mlp.down_proj.weight"][3, 4] = float("nan")


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"), "cannot be read"),
        (lambda f: _edit_weights(f, lambda w: w.pop("model.norm.weight")), "no tensor model.norm.weight"),
        (lambda f: _edit(f, intermediate_size=52), "has the shape"),
        (lambda f: _edit_weights(f, _nan), "layers.2.mlp.down_proj.weight holds values that are not finite"),
        (lambda f: _edit_weights(f, lambda w: w.update(x=torch.zeros(2))), "the tensor x would have to be supported"),
        (lambda f: _edit(f, architectures=["GPT2LMHeadModel"]), "architecture GPT2LMHeadModel: known are Llama"),
        (lambda f: _edit(f, num_local_experts=8), "experts would have to be supported"),
        (lambda f: _edit(f, attention_bias=True), "a bias of the output projection would have to be supported"),
        (lambda f: _edit(f, mlp_bias=True), "biases of the MLP would have to be supported"),
        (lambda f: _edit(f, sliding_window=16, layer_types=["sliding_attention"] * 3), "sliding_window = 16"),
        (lambda f: _edit(f, attn_logit_softcapping=50.0), "soft caps would have to be supported"),
        (lambda f: _edit(f, partial_rotary_factor=0.5), "a part of a head would have to be supported"),
        (lambda f: _edit(f, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_type = 'dynamic'"),
        (lambda f: _edit(f, rope_parameters={"rope_type": "linear"}), "config.json cannot be read: KeyError('factor')"),
        (lambda f: _edit(f, hidden_size="32"), "model.hidden = '32'"),
        (lambda f: _edit(f, quantization_config={"bits": 4}), "quantised weights"),
        (lambda f: _edit(f, hidden_act="gelu"), "hidden_act = 'gelu'"),
        (lambda f: _edit(f, something_new=3), "something_new = 3: this field would have to be supported"),
        (lambda f: (f / "tokenizer.model").unlink(), "there is no tokenizer"),
        (lambda f: _edit(f, vocab_size=100), "entries but the model 100"),
        (lambda f: _edit(f, model_type="qwen2"), "model_type = 'qwen2' contradicts architectures"),
        (lambda f: _edit(f, auto_map={"AutoModel": "x.y"}), "code of its own would have to be supported"),
        (lambda f: _edit(f, tie_word_embeddings=True), "lm_head.weight is not the embedding"),
        (lambda f: _edit(f, max_position_embeddings="abc"), "config.json cannot be read: ValueError"),
        (lambda f: _edit(f, rope_parameters={"rope_theta": "abc"}), "config.json cannot be read: ValueError"),
        (lambda f: _edit(f, num_attention_heads=0, head_dim=None), "config.json cannot be read: ZeroDivisionError"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: "),
        (lambda f: _index(f, ["a"]), "index.json has no weight_map"),
        (lambda f: _index(f, {"a": 5}), "index.json has no weight_map"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "write the weights as safetensors"),
        (lambda f: _settings(f, bos_token=5), "bos_token of the tokenizer is 5, not a text"),
        (lambda f: (f / "added_tokens.json").write_text('{"<extra>": 900}'), "adds tokens to tokenizer.model"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_taken(tmp_path, damage, line):
    make(tmp_path / "theirs")
    damage(tmp_path / "theirs")
    with pytest.raises(UserError) as error:
        adopt(tmp_path / "theirs", tmp_path / "run")
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def _index(folder, places):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _settings(folder, **values):
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data=5", "data = 5"),
        ("model=5", "model = 5"),
        ("model.prefix=foo", "model.prefix = 'foo'"),
        ("model.length=abc", "model.length = 'abc'"),
        ("model.rope.scaling=foo", "model.rope.scaling = 'foo'"),
        ("model.rope.foo=1", "unknown key 'model.rope.foo'"),
        ("model.prefix.gate=1.0", "model.prefix.gate = 1.0: an import begins as its model with gate=0.0 alone"),
        ("model.prefix.gate=null", "model.prefix.gate = None"),
        ("model.prefix.place=target", "an import begins as its model with place"),
        ("model.target_mlp=false", "model.target_mlp = False"),
        ("data.tokenizer=/nope", "an import has the tokenizer of its model"),
        ("data.eos_token=nope", "nope"),
    ],
)
def test_overrides_that_no_import_can_have(tmp_path, override, line):
    make(tmp_path / "theirs")
    with pytest.raises(UserError) as error:
        adopt(tmp_path / "theirs", tmp_path / "run", "model.two_stream_layers=2", override)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_fields_of_older_and_newer_files(tmp_path):
    """What transformers reads if a field is there twice: its rule, so its logits."""
    make(tmp_path / "theirs", seed=1)
    other = make(tmp_path / "other", seed=2)
    _edit(tmp_path / "other", rope_scaling={"rope_type": "linear", "factor": 4.0}, unsloth_version="2025.1", top_p=0.9)
    shutil.copy(tmp_path / "theirs/model.safetensors", tmp_path / "other/part.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "theirs/model.safetensors"), "part.safetensors")
    (tmp_path / "other/model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    adopt(tmp_path / "other", tmp_path / "run", "objective=ar")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other").eval()
    ours = standalone(tmp_path / "run")
    with torch.no_grad():
        expected = theirs(torch.tensor([[ours.config.bos_id, *TOKENS[:-1]]])).logits[0]
        unscaled = other(torch.tensor([[ours.config.bos_id, *TOKENS[:-1]]])).logits[0]
        got = logits_left_to_right(ours, TOKENS)
    assert float((got - expected).abs().max()) < 1e-4 < float((unscaled - expected).abs().max())


def test_an_import_only_fills_an_empty_place(tmp_path, monkeypatch):
    make(tmp_path / "theirs")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for place, line in (("theirs", "is not empty"), ("file", "is a file")):
        with pytest.raises(UserError, match=line):
            adopt(tmp_path / "theirs", tmp_path / place)
    with monkeypatch.context() as patch:
        patch.setattr(config_files, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            adopt(tmp_path / "theirs", tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    adopt(tmp_path / "theirs", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "theirs"]


def test_a_moved_import_and_what_comes_back_with_it(tmp_path, monkeypatch):
    """The tokenizer moves with the run; ids, settings of generation and the length are those of the model."""
    model = make(tmp_path / "theirs")
    model.generation_config.update(eos_token_id=[2, 5], temperature=0.6, do_sample=True)
    model.generation_config.save_pretrained(tmp_path / "theirs")
    _edit(tmp_path / "theirs", eos_token_id=[2, 5], pad_token_id=3)
    monkeypatch.chdir(tmp_path)
    pretrained.adopt(tmp_path / "theirs", Path("run"), None, ["model.length=32", "objective=ar"])
    shutil.move(tmp_path / "run", tmp_path / "moved")
    monkeypatch.chdir("/")
    run = RunDirectory(tmp_path / "moved")
    pretrained.write_folder(config_files.load_run(run), run.checkpoint(0), tmp_path / "back", True, None, 10**9)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    for field in ("eos_token_id", "pad_token_id", "max_position_embeddings", "bos_token_id"):
        assert after[field] == before[field]
    settings = [json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("theirs", "back")]
    assert settings[0] == settings[1]
    text = "émigré, <b> 3.5\n  x"
    own = tokenizers.load(tmp_path / "theirs").encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs.encode(text, add_special_tokens=False) == own


def test_a_configuration_that_contradicts_the_model(tmp_path):
    make(tmp_path / "theirs")
    with pytest.raises(UserError, match="model.layers is 4 in the configuration but 3 in"):
        adopt(tmp_path / "theirs", tmp_path / "run", "model.layers=4")
    with pytest.raises(UserError, match="model.length = 65 exceeds the 64 positions"):
        pretrained.adopt(tmp_path / "theirs", tmp_path / "run", None, ["model.length=65"])
    with pytest.raises(UserError, match="needs a mask token"):
        adopt(tmp_path / "theirs", tmp_path / "run", "objective=mdm")


def test_the_commands(tmp_path):
    make(tmp_path / "theirs")
    done = run_armd("import", f"{tmp_path}/theirs", f"{tmp_path}/run", "model.length=32")
    assert done.returncode == 0, done.stderr
    assert f"armd train --config {tmp_path}/run/config.yaml" in done.stdout
    done = run_armd("export", f"{tmp_path}/run", f"{tmp_path}/out")
    assert done.returncode == 0, done.stderr
    model = inference.load(tmp_path / "out")
    assert model.config.prefix_neighbour
    card = (tmp_path / "out/README.md").read_text()
    assert "| pretrained model | theirs (LlamaForCausalLM) |" in card
    assert "| token at position 0 | `<s>` |" in card
    done = run_armd("export", f"{tmp_path}/run", f"{tmp_path}/foreign", "--format", "transformers")
    assert done.returncode == 2
    assert "only objective=ar has one" in done.stderr
    done = run_tool(ROOT / "tools/convert_ckpt.py", "--from-transformers", f"{tmp_path}/theirs", f"{tmp_path}/run")
    assert done.returncode == 2
    assert "already has checkpoints" in done.stderr


LAYOUTS = {
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "context 2, zero 3": (2, {"context": 2, "zero": 3}),
    "tensor 2, pipeline 2, recompute": (4, {"tensor": 2, "pipeline": 2, "recompute": "full"}),
}


ACCEPTANCE = ["acceptance_1", "acceptance_2"]


def _check_acceptance(config):
    """Drafts of the held-out texts, accepted by the law of one token a block."""
    model = standalone(config.directory, 4)
    heldout = PackedDataset(config.data_directory / "heldout")
    tokens = torch.from_numpy(heldout.read(np.arange(4) * len(heldout) // 4))
    shared = model.acceptance(tokens, 2)
    record = [record for record in config.run_directory.metrics() if ACCEPTANCE[0] in record][-1]
    assert [record[name] for name in ACCEPTANCE] == pytest.approx([float(each.mean()) for each in shared], abs=1e-5)
    assert record["tokens_per_pass"] == pytest.approx(float((1 + shared[0] + shared[0] * shared[1]).mean()), abs=1e-5)


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "adapter alone"])
def test_every_layout_trains_an_imported_model_alike(tmp_path, frozen):
    """The first loss is that of transformers; later losses, divergences from the imported model, losses and acceptances
    of drafts, and weights are those of one process. ``frozen``: the weights of the imported model stay, bit for bit.
    """
    model = make(tmp_path / "theirs", "Qwen3ForCausalLM", "yarn", head_dim=12, rms_norm_eps=1e-3)
    (tmp_path / "a.txt").write_text("\n".join(f"{n} {runs.PANGRAMS}" for n in range(60)))
    settings = {
        "data.text": [f"{tmp_path}/a.txt"], "data.directory": f"{tmp_path}/data", "data.heldout_fraction": 0.2,
        "orders.ar_steps": 2, "orders.permutation_steps": 3, "orders.rho": 8, "orders.strided_steps": 1,
        "orders.drafts": 2,
        "train.steps": 3, "train.distill": 0.5, "train.global_batch": 4, "train.micro_batch": 2, "train.log_every": 1,
        "train.dtype": "float32", "train.eval_samples": 4, "optimizer.warmup_steps": 0, "optimizer.lr": 1e-3,
        "optimizer.eps": 1e-3, "report.wandb": "disabled",
    }  # fmt: skip
    layouts = dict(LAYOUTS)
    if frozen:
        settings |= {"model.adapter.rank": 3, "train.freeze": True, "orders.draft_target": "law", "train.distill": 0.0}
        settings |= {"orders.strided_steps": 0, "train.steps": 4, "optimizer.ema": 0.9}
        layouts["context 2, zero 2"] = (2, {"context": 2, "zero": 2})
        del layouts["pipeline 2"], layouts["tensor 2, sequence"]
    given = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    first, _ = adopt(tmp_path / "theirs", tmp_path / "one", *given)
    prepare.prepare(first)
    records = [record for record in runs.start(first) if "loss" in record]
    index = PackedDataset(first.data_directory / "train").index
    samples = Samples(configs.with_vocabulary(first, index["vocab_size"], index["bos_id"]))
    samples.start(0, {})
    tokens = torch.from_numpy(samples.read(0, 4))
    with torch.no_grad():
        logits = model(torch.cat([torch.full((4, 1), first.model.bos_id), tokens[:, :-1]], dim=1)).logits
    expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
    assert records[0]["loss"] == pytest.approx(expected, abs=1e-4)
    if frozen:
        begun, ended = (runs.tensors(first.run_directory.checkpoint(step), raw=False) for step in (0, 4))
        for name, tensor in begun.items():
            assert torch.equal(ended[name], tensor) != is_adapter(name.partition("/")[2]), name
        assert all(records[step]["drafts"] > 0 for step in range(4))
    else:
        assert "divergence" not in records[0]  # 0: the model is the teacher
        assert records[1]["divergence"] > 1e-4
    _check_acceptance(first)
    final = runs.tensors(first.run_directory.checkpoint(4), raw=False)
    for number, (name, (processes, parallel)) in enumerate(layouts.items()):
        place = tmp_path / str(number)
        layout = [f"parallel.{field}={json.dumps(value)}" for field, value in parallel.items()]
        config, _ = adopt(tmp_path / "theirs", place, *given, *layout, f"cluster.tasks_per_node={processes}")
        records = map(runs.figures, (runs.start(config), first.run_directory.metrics()))
        for found, known in zip(*records, strict=True):
            assert found.keys() == known.keys(), name
            for field in known.keys() & {"loss", "divergence", "drafts", *ACCEPTANCE, "tokens_per_pass"}:
                assert found[field] == pytest.approx(known[field], rel=1e-3 if field == "divergence" else 1e-4), name
        found = runs.tensors(config.run_directory.checkpoint(4), raw=False)
        assert found.keys() == final.keys()
        for key, tensor in final.items():
            torch.testing.assert_close(found[key], tensor, atol=2e-5, rtol=1e-3, msg=f"{name}: {key}")


def _without_biases(monkeypatch):
    join = architectures.Pair.join

    def without(pair, parts):
        return join(pair, parts) * (not pair.name.endswith("bias"))

    monkeypatch.setattr(architectures.Pair, "join", without)


def _half_rotated(monkeypatch):
    rotate = network.rotate

    def half(x, cos, sin):
        width = cos.shape[-1]
        return torch.cat([rotate(x, cos, sin)[..., :width], x[..., width:]], dim=-1)

    monkeypatch.setattr(network, "rotate", half)


@pytest.mark.parametrize("broken", [None, _without_biases, _half_rotated])
def test_biases_and_rotation_count(tmp_path, monkeypatch, broken):
    model = make(tmp_path / "theirs", "Qwen2ForCausalLM")
    if broken:
        broken(monkeypatch)
    adopt(tmp_path / "theirs", tmp_path / "run", "objective=ar")
    ours = standalone(tmp_path / "run")
    with torch.no_grad():
        expected = model(torch.tensor([[ours.config.bos_id, *TOKENS[:-1]]])).logits[0]
        difference = float((logits_left_to_right(ours, TOKENS) - expected).abs().max())
    assert difference > 1e-2 if broken else difference < 1e-4


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_teacher_stays(tmp_path, weight):
    """Checkpoint 0 is kept while it teaches, and the second job reads it again."""
    make(tmp_path / "theirs")
    (tmp_path / "a.txt").write_text("\n".join(f"{n} {runs.PANGRAMS}" for n in range(60)))
    settings = {
        "data.text": [f"{tmp_path}/a.txt"], "data.heldout_fraction": 0.2, "objective": "ar", "train.steps": 2,
        "train.distill": weight, "train.checkpoint_every": 1, "train.keep_checkpoints": 1, "train.global_batch": 2,
        "train.micro_batch": 2, "train.dtype": "float32", "train.log_every": 1, "train.head_batch": 1,
        "train.eval_samples": 2, "optimizer.warmup_steps": 0, "report.wandb": "disabled",
    }  # fmt: skip
    config, _ = adopt(tmp_path / "theirs", tmp_path / "run", *(f"{k}={json.dumps(v)}" for k, v in settings.items()))
    prepare.prepare(config)
    runs.start(config)
    names = [path.name for path in config.run_directory.complete_checkpoints()]
    assert names == (["step-00000000"] if weight else []) + ["step-00000002"]
    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})
    records = [record for record in runs.start(more) if "loss" in record]
    assert [("divergence" in record) for record in records] == [False, weight > 0, weight > 0]
    if weight:
        config.run_directory.origin_path.unlink()
        with pytest.raises(
            torch.multiprocessing.ProcessRaisedException,
            match="has no checkpoint 0 of one: begin the run with armd import",
        ):
            runs.start(more)
