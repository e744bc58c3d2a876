"""Generation, classes and fine-tuning of a model directory as users of transformers know them."""

import copy
import dataclasses
import itertools
import math
import pickle
import warnings

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from armd_scale import inference
from armd_scale.inference import Decoding
from armd_scale.inference.huggingface import ARMDForCausalLM, ARMDHubConfig
from tests.conftest import BASELINES, FEATURES, LEARNED, PAPER, standalone

WAYS = {"left-to-right": {}, "streams": {"streams": 3}, "exact": {"draft": 3}, "both": {"streams": 2, "draft": 2}}


@pytest.fixture(scope="module")
def asked(hub):
    """Model, tokenizer and the tokens of a prompt."""
    model, tokenizer = hub
    return model, tokenizer, tokenizer(["def"], return_tensors="pt").input_ids


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request):
    return request.param


def new_tokens(model, ids, **settings):
    """The generated tokens of the first text."""
    return model.generate(ids, max_new_tokens=9, **settings)[0, ids.shape[1] :].tolist()


def by_argument(model, ids, ends, **way):
    return new_tokens(model, ids, eos_token_id=ends[0], **way)


def by_list(model, ids, ends, **way):
    return new_tokens(model, ids, eos_token_id=[*ends, -1], **way)


def by_generation_config(model, ids, ends, **way):
    return new_tokens(model, ids, generation_config=GenerationConfig(eos_token_id=ends), **way)


def by_the_models_configuration(model, ids, ends, **way):
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = ends[0]
    return new_tokens(model, ids, **way)


@pytest.mark.parametrize("call", [by_argument, by_list, by_generation_config, by_the_models_configuration])
def test_a_text_ends_at_eos_wherever_it_is_given(asked, way, call):
    model, _, ids = asked
    whole = new_tokens(model, ids, eos_token_id=None, **way)
    assert len(whole) == 9
    end = whole[4]
    assert call(model, ids, [end], **way) == whole[: whole.index(end) + 1]
    unused = next(token for token in range(20, 40) if token not in whole)
    assert call(model, ids, [unused], **way) == whole


def test_ended_texts_are_filled_up_with_the_padding_token(asked):
    model, tokenizer, _ = asked
    batch = tokenizer(["def", "the", "words"], return_tensors="pt", padding=True, padding_side="left")
    size = batch.input_ids.shape[1]
    free = model.generate(**batch, max_new_tokens=6, eos_token_id=None, do_sample=True, seed=2)[:, size:]
    end = int(free[0, 1])
    settings = {"max_new_tokens": 6, "do_sample": True, "seed": 2, "return_dict_in_generate": True}
    out = model.generate(**batch, eos_token_id=end, pad_token_id=7, **settings).sequences[:, size:]
    texts = [[*itertools.takewhile(lambda token: token != end, row), end][:6] for row in free.tolist()]
    width = max(map(len, texts))
    assert out.tolist() == [text + [7] * (width - len(text)) for text in texts]
    assert len(texts[0]) < width


def test_bos_may_be_left_out_of_a_prompt(asked, way):
    model, _, ids = asked
    assert new_tokens(model, ids[:, 1:], **way) == new_tokens(model, ids, **way)


def test_several_texts_of_a_prompt(asked):
    model, _, ids = asked
    settings = {"do_sample": True, "seed": 5, "max_new_tokens": 6, "eos_token_id": None}
    out = model.generate(ids, num_return_sequences=3, **settings)
    assert torch.equal(out, model.generate(ids.repeat(3, 1), **settings))
    assert len({*map(tuple, out.tolist())}) == 3


def test_a_text_does_not_end_before_its_least_length(asked, way):
    model, _, ids = asked
    whole = new_tokens(model, ids, eos_token_id=None, **way)
    ends = whole[:4]
    held = new_tokens(model, ids, eos_token_id=ends, min_new_tokens=5, **way)
    assert len(held) >= 5
    assert not {*held[:5]} & {*ends}
    assert held == new_tokens(model, ids, eos_token_id=ends, min_length=5 + ids.shape[1], **way)


def test_scores_are_those_of_the_tokens_written(asked, way):
    model, _, ids = asked
    out = model.generate(
        ids, max_new_tokens=8, return_dict_in_generate=True, output_scores=True, output_logits=True, **way
    )
    made = out.sequences[0, ids.shape[1] :]
    assert len(out.scores) == len(out.logits) == len(made)
    assert [int(row.argmax()) for row in out.logits] == made.tolist()
    assert [int(row[0].argmax()) for row in out.scores] == made.tolist()
    if not way:
        again = model(out.sequences).logits[:, ids.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.stack(out.logits, 1), again, atol=1e-4, rtol=1e-4)


def test_scores_are_after_temperature_and_truncation(asked):
    model, _, ids = asked
    settings = {"do_sample": True, "top_k": 4, "temperature": 0.5, "min_new_tokens": 2, "seed": 1}
    out = model.generate(
        ids, max_new_tokens=5, return_dict_in_generate=True, output_scores=True, output_logits=True, **settings
    )
    for logits, scores in zip(out.logits, out.scores, strict=True):
        kept = scores[0].isfinite()
        assert int(kept.sum()) == 4
        torch.testing.assert_close(scores[0][kept], (logits[0] / 0.5)[kept].log_softmax(-1), atol=1e-4, rtol=1e-4)
    chances = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert bool((chances <= 0).all())
    assert bool(chances.isfinite().all())


def test_a_streamer_gets_the_text_in_its_order(asked, way, capsys):
    model, tokenizer, ids = asked
    end = new_tokens(model, ids, eos_token_id=None, **way)[6]
    streamer = TextIteratorStreamer(tokenizer)
    out = model.generate(ids, max_new_tokens=9, eos_token_id=end, streamer=streamer, **way)
    assert out.tolist() == model.generate(ids, max_new_tokens=9, eos_token_id=end, **way).tolist()
    assert "".join(streamer) == tokenizer.decode(out[0])
    model.generate(ids, max_new_tokens=3, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out


def test_stopping_criteria_see_the_text_token_by_token(asked, way):
    model, tokenizer, _ = asked
    batch = tokenizer(["def", "the"], return_tensors="pt", padding=True, padding_side="left")
    size, seen = batch.input_ids.shape[1], []

    def stop(ids, scores):
        seen.append(ids.shape[1] - size)
        return torch.tensor([ids.shape[1] >= size + 3, ids.shape[1] >= size + 5])

    settings = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 3, **way}
    out = model.generate(**batch, stopping_criteria=StoppingCriteriaList([stop]), **settings)[:, size:]
    whole = model.generate(**batch, **settings)[:, size:]
    assert seen == [1, 2, 3, 4, 5]
    assert out[0].tolist() == [*whole[0, :3].tolist(), 3, 3]
    assert out[1].tolist() == whole[1, :5].tolist()


def test_stop_strings_and_time(asked):
    model, tokenizer, ids = asked
    written = tokenizer("def the cache", add_special_tokens=False).input_ids
    forced = copy.deepcopy(model)
    forced.model.decode = lambda tasks: iter(
        [inference.Step(torch.tensor([[at]]), torch.tensor([[token]])) for at, token in zip(tasks[0].order, written)]
    )
    out = forced.generate(ids[:, :1], max_new_tokens=len(written), stop_strings=[" the"], tokenizer=tokenizer)
    assert tokenizer.decode(out[0, 1:]) == "def the"
    assert new_tokens(model, ids, max_time=0.0, eos_token_id=None) == new_tokens(model, ids, eos_token_id=None)[:1]


NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "logits_processor": [],
    "stopping_criteria": [],
    "bad_words_ids": None,
    "suppress_tokens": [],
    "early_stopping": False,
    "use_cache": False,
    "output_attentions": False,
    "num_return_sequences": 1,
    "top_k": 0,
    "top_p": 1.0,
    "synced_gpus": False,
    "assistant_model": None,
}


@pytest.mark.parametrize(("name", "value"), NEUTRAL.items(), ids=NEUTRAL)
def test_what_asks_for_nothing_is_accepted(asked, name, value):
    model, _, ids = asked
    assert new_tokens(model, ids, **{name: value}) == new_tokens(model, ids)


REFUSED = {
    "num_beams": 2,
    "repetition_penalty": 1.2,
    "logits_processor": [print],
    "bad_words_ids": [[5]],
    "assistant_model": object(),
    "prefix_allowed_tokens_fn": print,
    "output_attentions": True,
    "tempreature": 0.5,
    "position_ids": torch.arange(4)[None],
}


@pytest.mark.parametrize(("name", "value"), REFUSED.items(), ids=REFUSED)
def test_what_has_no_meaning_here_is_one_line(asked, name, value):
    model, _, ids = asked
    with pytest.raises(ValueError, match=rf"generate cannot use {name}: leave it out, or choose from .*eos_token_id"):
        model.generate(ids, **{name: value})


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        pytest.param({"num_return_sequences": 2}, "2 greedy texts are all the same: set do_sample=True", id="copies"),
        pytest.param({"stop_strings": ["a"]}, "pass tokenizer= as well", id="stop-strings"),
        pytest.param({"attention_mask": torch.ones(1, 9)}, r"input_ids \[1, .\] and attention_mask", id="mask"),
        pytest.param({"eos_token_id": 10**6}, "token 1000000 is not in the vocabulary", id="eos"),
        pytest.param({"max_length": 1}, "-. new tokens: raise max_length", id="length"),
        pytest.param({"inputs": [[1, 5]]}, r"input_ids must be a tensor: write generate\(\*\*tokenizer", id="list"),
    ],
)
def test_settings_that_contradict_each_other(asked, settings, line):
    model, _, ids = asked
    with pytest.raises(ValueError, match=line):
        model.generate(**{"inputs": ids, **settings})


def test_texts_are_written_under_autocast(asked, way):
    model, _, ids = asked
    with torch.autocast("cpu", torch.bfloat16):
        assert len(new_tokens(model, ids, eos_token_id=None, **way)) == 9


@pytest.mark.parametrize("settings", [{"max_new_tokens": 256}, {"max_length": 256}])
def test_a_length_beyond_the_models_is_cut_with_a_warning(asked, settings):
    model, _, ids = asked
    with pytest.warns(UserWarning, match=r"25. new tokens do not fit: these texts get up to"):
        out = model.generate(ids, **settings, eos_token_id=None)
    assert out.shape[1] == model.config.length + 1


def test_padding_without_a_mask(asked):
    model, tokenizer, _ = asked
    batch = tokenizer(["def", "the cache"], return_tensors="pt", padding=True, padding_side="right")
    with pytest.warns(UserWarning, match="no attention_mask"):
        model.generate(batch.input_ids, max_new_tokens=2)
    wanted = model.generate(**batch, max_new_tokens=2, pad_token_id=9)
    other = batch.input_ids.masked_fill(batch.attention_mask == 0, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model.generate(other, max_new_tokens=2, pad_token_id=9)
    assert torch.equal(out[:, -2:], wanted[:, -2:])


def test_forward_arguments(asked):
    model, tokenizer, _ = asked
    batch = tokenizer(["def", "the cache"], return_tensors="pt", padding=True, padding_side="right")
    out = model(**batch, labels=batch.input_ids)
    natural = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0).masked_fill(batch.attention_mask == 0, 1)
    assert torch.equal(model(**batch, position_ids=natural).logits, out.logits)
    loss, logits = model(**batch, labels=batch.input_ids, return_dict=False)
    assert torch.equal(logits, out.logits)
    assert torch.equal(loss, out.loss)
    with pytest.raises(ValueError, match="position_ids must count each text's tokens from 0: leave them out"):
        model(**batch, position_ids=natural + 1)
    with pytest.raises(ValueError, match="padding must be on the right"):
        model(batch.input_ids, attention_mask=batch.attention_mask.flip(1))
    with pytest.raises(ValueError, match="inputs_embeds is not offered"):
        model(**batch, inputs_embeds=torch.zeros(1))


def test_models_are_pickled(asked):
    model, _, ids = asked
    assert torch.equal(pickle.loads(pickle.dumps(model)).generate(ids), model.generate(ids))


def test_a_model_from_its_configuration_has_the_weights_of_a_new_one(place):
    config = AutoConfig.from_pretrained(str(place), trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    ids = torch.tensor([[config.bos_id, *range(4, 16)]])
    assert float(model(ids, labels=ids).loss.detach()) == pytest.approx(math.log(config.vocab_size), abs=0.1)


def hub_of(config):
    """A transformers model with the random weights of a standalone model."""
    own = standalone(config).float()
    model = ARMDForCausalLM(ARMDHubConfig(**vars(own.config)))
    return model, own


@pytest.mark.parametrize("config", [PAPER, LEARNED, FEATURES], ids=["paper", "learned", "features"])
def test_new_weights_are_drawn_as_in_training(config):
    torch.manual_seed(0)
    model, _ = hub_of(config.model_copy(update={"hidden": 128, "heads": 2, "kv_heads": 1, "vocab_size": 400}))
    wanted = {
        "bias": (0, 0),
        "_adapter.b": (0, 0),
        "draft_gate": (0, 0),
        "norm": (1, 0),
        "table": (0, config.prefix_dim**-0.5),
    }
    wanted |= dict.fromkeys(("output.weight", "down.weight"), (0, 0.02 / (2 * config.layers) ** 0.5))
    for name, parameter in model.named_parameters():
        mean, std = next((spread for part, spread in wanted.items() if part in name), (0, 0.02))
        if name.endswith("_adapter.a"):
            std = parameter.shape[1] ** -0.5
        spread = max(0.1, 4 * parameter.numel() ** -0.5)
        assert float(parameter.detach().mean()) == pytest.approx(mean, abs=spread * std + 1e-6), name
        assert float(parameter.detach().std()) == pytest.approx(std, rel=spread), name


class Doubled(torch.nn.Module):
    """A module in place of another one, as LoRA and quantisers use them."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, rows):
        return 2 * self.inner(rows)


@pytest.mark.parametrize("change", ["module", "hook", "forward"])
@pytest.mark.parametrize("part", ["attention.query", "attention.key_value", "attention.output", "mlp.up", "mlp.down"])
def test_what_replaces_a_linear_is_used(part, change):
    """In one pass and in decoding, whose products of few rows take another way."""
    model, own = hub_of(FEATURES)
    model.model.load_state_dict(own.state_dict())
    linear = model.model.get_submodule(f"layers.0.{part}")
    assert isinstance(linear, torch.nn.Linear)
    wanted = copy.deepcopy(own)
    for tensor in wanted.get_submodule(f"layers.0.{part}").parameters():
        tensor.data.mul_(2)
    if change == "module":
        model.model.set_submodule(f"layers.0.{part}", Doubled(linear))
    elif change == "hook":
        linear.register_forward_hook(lambda module, rows, out: 2 * out)
    else:
        inner = linear.forward
        linear.forward = lambda rows: 2 * inner(rows)
    tokens = torch.arange(4, 16)[None]
    torch.testing.assert_close(model.model.nll(tokens), wanted.nll(tokens), atol=1e-4, rtol=1e-4)
    greedy = Decoding(temperature=0)
    assert torch.equal(model.model.generate([[5, 6]], decoding=greedy), wanted.generate([[5, 6]], decoding=greedy))
    assert not torch.equal(own.nll(tokens), wanted.nll(tokens))


@pytest.mark.parametrize("config", [PAPER, FEATURES, BASELINES["card"]], ids=["tied", "untied", "mask"])
@pytest.mark.parametrize("size", [57, 40])
def test_the_vocabulary_is_resized(config, size, tmp_path):
    model, own = hub_of(config)
    model.model.load_state_dict(own.state_dict())
    before = model.get_input_embeddings().weight.detach().clone()
    embedding = model.resize_token_embeddings(size, mean_resizing=False)
    assert embedding is model.get_input_embeddings() is model.model.embedding
    assert model.config.vocab_size == model.model.config.vocab_size == size
    kept = min(size, 50)
    assert torch.equal(embedding.weight[:kept], before[:kept])
    if config.traits.mask:
        assert torch.equal(embedding.weight[-1], before[-1])
    ids = torch.tensor([[config.bos_id, 5, 6, 7]])
    assert model(ids).logits.shape == (1, 4, size)
    assert len(model.get_output_embeddings().weight) == size + (config.traits.mask and config.tied_head)
    scores, wanted = model(ids).logits[..., :kept], own.logits(torch.tensor([[5, 6, 7, 8]]))[..., :kept]
    torch.testing.assert_close(scores.detach(), wanted)
    model.save_pretrained(tmp_path)
    loaded = inference.load(tmp_path)
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(model.model.config)
    assert torch.equal(loaded.embedding.weight, embedding.weight)
