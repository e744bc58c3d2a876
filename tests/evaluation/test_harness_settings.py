"""Settings of the harness: what tasks and the command line ask of a model."""

import json
import shutil

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry

from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError
from armd_scale.evaluation.harness import ARMDHarness, generation
from armd_scale.inference import FREE, Decoding, InputError
from tests.conftest import PAPER, model_folder

WORDS = "the quick brown fox jumps over the lazy dog and runs away from it\n" * 30


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    tokenizer = tokenizers.train([WORDS], tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 290)
    return model_folder(tmp_path_factory.mktemp("model"), PAPER.model_copy(update={"length": 24}), tokenizer)


@pytest.fixture(scope="module")
def harness(model_dir):
    return ARMDHarness(str(model_dir))


def ask(harness, context, **settings):
    instance = Instance(request_type="generate_until", doc={}, arguments=(context, settings), idx=0)
    return harness.generate_until([instance], disable_tqdm=True)[0]


def expected(harness, context, count, decoding):
    model, tokenizer = harness._model, harness._tokenizer
    prompt = tokenizer.encode(context)[-(model.config.length - count) :]
    [text] = model.complete(model.plan([prompt + [FREE] * count], decoding, [0]))
    return tokenizer.decode(text.tolist())[len(tokenizer.decode(prompt)) :]


GREEDY = Decoding(temperature=0, stop=True)


@pytest.mark.parametrize(
    ("settings", "count", "decoding"),
    [
        pytest.param({}, 12, GREEDY, id="half-of-the-length"),
        *[({name: 5}, 5, GREEDY) for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")],
        pytest.param({"max_gen_toks": 9, "max_new_tokens": 4}, 4, GREEDY, id="last-name"),
        pytest.param({"max_gen_toks": 20}, 20, GREEDY, id="more-than-half"),
        pytest.param({"max_tokens": 5, "until": None}, 5, GREEDY, id="until-null"),
        pytest.param({"max_tokens": 5, "until": [None, ""]}, 5, GREEDY, id="until-empty"),
        pytest.param({"max_tokens": 5, "temperature": None, "top_k": None}, 5, GREEDY, id="nulls"),
        pytest.param({"max_tokens": 5, "do_sample": False, "temperature": 0.7}, 5, GREEDY, id="greedy"),
        pytest.param({"max_tokens": 5, "do_sample": True}, 5, Decoding(stop=True), id="sampled"),
        pytest.param({"max_tokens": 5, "num_beams": 1, "repetition_penalty": 1.0}, 5, GREEDY, id="neutral"),
        pytest.param(
            {"max_tokens": 8, "temperature": 0.7, "top_k": 9.0, "streams": 2},
            8,
            Decoding(2, temperature=0.7, top_k=9, stop=True),
            id="fields",
        ),
    ],
)
def test_generation_settings(harness, settings, count, decoding):
    assert ask(harness, "the lazy", **settings) == expected(harness, "the lazy", count, decoding)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"max_gen_toks": 24}, "leaves no room for a prompt"),
        ({"max_gen_toks": 0}, "at least 1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not available"),
        ({"max_length": 10}, "max_length=10 is not available"),
        ({"top_p": 7}, "top_p must be"),
    ],
)
def test_refused_settings(harness, settings, line):
    with pytest.raises((UserError, InputError), match=line):
        ask(harness, "the", **settings)


def test_stop_strings_end_generation(harness, monkeypatch):
    decode, steps = harness._model.decode, []
    monkeypatch.setattr(harness._model, "decode", lambda tasks: (steps.append(1) or step for step in decode(tasks)))
    whole = ask(harness, "the lazy", max_tokens=20)
    assert len(steps) == 20
    steps.clear()
    assert ask(harness, "the lazy", max_tokens=20, until=whole[4:6]) == whole[: whole.index(whole[4:6])]
    assert len(steps) < 20


def test_a_text_does_not_depend_on_its_batch(harness):
    """Tasks with their own settings share a call."""
    settings = [{"max_tokens": 3 + n % 5, "draft": 2 * (n % 2), "until": ["x"] if n % 3 else None} for n in range(40)]
    instances = [
        Instance(request_type="generate_until", doc={}, arguments=(WORDS[: n % 7], each), idx=0)
        for n, each in enumerate(settings)
    ]
    texts = harness.generate_until(instances, disable_tqdm=True)
    assert texts == [ask(harness, WORDS[: n % 7], **each) for n, each in enumerate(settings)]


def test_cut_texts_are_reported(harness, capsys):
    ask(harness, WORDS, max_tokens=5)
    harness._loglikelihood_tokens([(("", ""), [5] * 30, [6]), (("", ""), [5], [6])], disable_tqdm=True)
    error = capsys.readouterr().err
    assert error.count("1 of 1 texts are longer than 24 tokens") == 1
    assert error.count("1 of 2 texts are longer than 24 tokens") == 1


@pytest.mark.parametrize(
    ("words", "batch"),
    [
        ({"batch_size": "auto"}, 16),
        ({"batch_size": "auto:4", "max_batch_size": 4}, 4),
        ({"batch_size": "3"}, 3),
        ({"trust_remote_code": True}, 16),
    ],
)
def test_arguments(model_dir, words, batch):
    assert ARMDHarness(str(model_dir), **words)._batch == batch


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"batch_size": "all"}, "batch_size must be auto or"),
        ({"batch_size": 0}, "batch_size must be auto or"),
        ({"add_bos_token": True}, "has no 'add_bos_token'"),
        ({"pretrained": None}, "needs pretrained=MODEL_DIR"),
    ],
)
def test_refused_arguments(model_dir, words, line):
    with pytest.raises(UserError, match=line):
        ARMDHarness(**{"pretrained": str(model_dir), **words})


def test_chats(model_dir, harness, tmp_path):
    """The template's BOS is a token, which the model adds itself."""
    with pytest.raises(UserError, match="no chat template"):
        harness.apply_chat_template([{"role": "user", "content": "the dog"}])
    shutil.copytree(model_dir, tmp_path / "m")
    settings = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(settings))
    chatting = ARMDHarness(str(tmp_path / "m"))
    text = chatting.apply_chat_template([{"role": "user", "content": "the dog"}])
    tokens = [*chatting._tokenizer.encode("the dog"), chatting.eot_token_id]
    assert chatting.tok_encode(text) == [chatting.prefix_token_id, *tokens]
    model = chatting._model
    [wanted] = model.complete(model.plan([tokens + [FREE] * 4], GREEDY, [0]))
    written = wanted[len(tokens) :].tolist()
    assert ask(chatting, text, max_tokens=4) == chatting._tokenizer.decode([*tokens, *written])[len("the dog") :]


def test_the_models_of_the_harness_stay():
    assert {"armd", "hf", "local-completions"} <= set(model_registry.keys())


def test_generation_of_nothing_given():
    assert generation({}, {}) == (None, [], GREEDY)
