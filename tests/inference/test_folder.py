"""A model directory with its own code: as a Hugging Face model, as a single file, and with both kinds of tokenizer."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armd_scale import inference
from armd_scale.data import tokenizer as tokenizers
from armd_scale.inference import Decoding, InputError
from tests.inference.conftest import TEXT, auto


def test_as_a_hugging_face_model(place, tmp_path):
    """Logits and loss are the model's, left to right; what transformers saves loads again, also here."""
    hub, tokenizer = auto(place)
    own, words = inference.load(place), tokenizers.load(place)
    batch = tokenizer(["def", "the cache"], return_tensors="pt", padding=True, padding_side="right")
    ids, mask = batch.input_ids, batch.attention_mask.bool()
    labels = ids.masked_fill(~mask, -100)
    out = hub(**batch, labels=ids)
    total = 0.0
    for row, text in enumerate(("def", "the cache")):
        tokens = words.encode(text)
        assert ids[row][mask[row]].tolist() == [words.bos_id, *tokens]
        assert torch.equal(labels[row][mask[row]], ids[row][mask[row]])
        nll = own.nll(torch.tensor([tokens]))
        scored = out.logits[row, : len(tokens)].log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
        torch.testing.assert_close(-scored[:, 0], nll[0], atol=1e-4, rtol=1e-4)
        total += float(nll.sum())
    assert float(out.loss) == pytest.approx(total / int(mask[:, 1:].sum()), rel=1e-4)
    out.loss.backward()
    assert float(hub.model.embedding.weight.grad.abs().sum()) > 0
    hub.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = auto(tmp_path)
    assert torch.equal(again(**batch).logits, out.logits)
    tokens = torch.tensor([words.encode("the cache")])
    torch.testing.assert_close(inference.load(tmp_path).nll(tokens), own.nll(tokens))


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_of_hugging_face(place, hub, side):
    """The usual settings, with padding on either side, give the texts of this project."""
    model, tokenizer = hub
    own, words = inference.load(place), tokenizers.load(place)
    texts = ["def", "the"]
    prompts = [words.encode(text) for text in texts]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
    out = model.generate(**batch, max_new_tokens=6, do_sample=True, top_p=0.9, streams=2, seed=3)
    assert torch.equal(out[:, : batch.input_ids.shape[1]], batch.input_ids)
    way = Decoding(streams=2, top_p=0.9, stop=True)
    wanted = own.generate(prompts, new_tokens=6, decoding=way, seed=3)
    for row, prompt in enumerate(prompts):
        made = out[row, batch.input_ids.shape[1] :]
        assert torch.equal(made, wanted[row, len(prompt) : len(prompt) + 6])


def test_hugging_face_is_greedy_unless_it_samples(place, hub):
    model, tokenizer = hub
    batch = tokenizer(["def"], return_tensors="pt")
    greedy = model.generate(**batch, max_length=10)
    assert torch.equal(greedy, model.generate(**batch, max_length=10))
    assert greedy.shape == (1, 10)
    torch.manual_seed(0)
    sampled = [model.generate(**batch, do_sample=True) for _ in range(2)]
    assert not torch.equal(*sampled)
    assert sampled[0].shape == (1, inference.load(place).config.length + 1)
    torch.manual_seed(0)
    assert torch.equal(sampled[0], model.generate(**batch, do_sample=True))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        pytest.param(lambda model, batch: model.generate(**batch, num_beams=4), "num_beams", id="beams"),
        pytest.param(
            lambda model, batch: model.generate(batch.input_ids[:, :1].repeat(1, 18)),
            "17 tokens behind BOS, but this model takes 16: shorten it",
            id="long-prompt",
        ),
        pytest.param(
            lambda model, batch: model(torch.tensor([[5, 6]])), "input_ids must be BOS", id="text-without-bos"
        ),
        pytest.param(
            lambda model, batch: model(batch.input_ids, attention_mask=torch.zeros_like(batch.input_ids)),
            "padding",
            id="mask-of-nothing",
        ),
    ],
)
def test_what_hugging_face_cannot_ask_for(hub, call, line):
    model, tokenizer = hub
    batch = tokenizer(["def"], return_tensors="pt")
    with pytest.raises(ValueError, match=line):
        call(model, batch)


@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(list(TEXT))), max_size=40))
def test_auto_tokenizer_gives_the_same_tokens(hub, own_tokenizer, text):
    tokens = own_tokenizer.encode(text)
    assert hub[1](text).input_ids == [own_tokenizer.bos_id, *tokens]
    decoded = hub[1].decode([own_tokenizer.bos_id, *tokens], skip_special_tokens=True)
    assert decoded == own_tokenizer.decode(tokens) == text


def test_the_single_file_is_the_package(place):
    """``modeling_armd.py`` alone, in a process that has no other package of this project."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import modeling_armd as m; model = m.load(sys.argv[1]);"
        "print(model.generate([[5, 6]], decoding=m.Decoding(streams=2, draft=3), seed=2).tolist());"
        "print(model.nll(torch.arange(12)[None]).tolist());"
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'armd_scale', 'transformers', 'sentencepiece'}))"
    )
    out = subprocess.run(
        [sys.executable, "-I", "-c", code, str(place)], capture_output=True, text=True, check=True, cwd="/"
    ).stdout.splitlines()
    model = inference.load(place)
    assert out[0] == str(model.generate([[5, 6]], decoding=Decoding(streams=2, draft=3), seed=2).tolist())
    assert out[1] == str(model.nll(torch.arange(12)[None]).tolist())
    assert out[2] == "[]"


def test_a_type_that_is_not_supported(pieces):
    with pytest.raises(InputError, match=r"float16: choose float32"):
        inference.load(pieces, dtype=torch.float16)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_type_or_its_name(pieces, dtype):
    assert inference.load(pieces, dtype=dtype).embedding.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_devices_that_are_not_there(pieces, device):
    with pytest.raises(InputError, match=f"device {device}"):
        inference.load(pieces, device=device)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match="not a model directory"):
        inference.load(tmp_path)
