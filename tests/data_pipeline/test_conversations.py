"""Conversations and texts behind a prompt: their answers alone count in the loss."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from armd_scale.config import RunConfig
from armd_scale.data import chat, conversations, shards
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.shards import PackedDataset
from armd_scale.errors import UserError
from armd_scale.orders import left_to_right
from armd_scale.rows import arrange, only
from data_pipeline.prepare import prepare
from tests.data.test_control_tokens import byte_level

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer") / "chat"
    byte_level(place, SPECIAL, tokenizer_config={"bos_token": SPECIAL[0], "eos_token": SPECIAL[0]})
    (place / "chat_template.jinja").write_text(CHAT)
    return place


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.load(folder)


def conversation(number):
    roles = ["user", "assistant"] * (1 + number % 3)
    talk = [{"role": role, "content": f"{role} says {number} of {place}"} for place, role in enumerate(roles)]
    return [{"role": "system", "content": "be kind"}, *talk] if number % 2 else talk


def configure(place, text, length=64, **data):
    fields = {"text": [str(text)], "directory": str(place / "data"), "samples_per_shard": 8, "workers": 1}
    return RunConfig.model_validate(
        {
            "run_dir": str(place / "run"),
            "model": {"length": length},
            "orders": {"rho": 8},
            "report": {"prompt": "a"},
            "data": {**fields, "heldout_fraction": 0.2, **data},
        }
    )


@given(st.integers(0, 20))
def test_tokens_and_mask_are_those_of_transformers(folder, tokenizer, number):
    """``apply_chat_template`` with the mask of what an assistant says; here BOS and EOS are no part of a document."""
    library = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=SPECIAL[0], eos_token=SPECIAL[0], chat_template=CHAT
    )
    messages = conversation(number)
    expected = library.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    parts = conversations.segments(messages, chat.load(tokenizer))
    assert "".join(parts) == library.apply_chat_template(messages, tokenize=False)
    tokens, counted = conversations.encode(tokenizer, parts, special=True)
    assert expected["input_ids"][0] == tokenizer.bos_id
    assert tokens.tolist() == expected["input_ids"][1:]
    assert counted.astype(int).tolist() == expected["assistant_masks"][1:]
    # the tokens before an answer are those with which a server asks for it
    first = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
    asked = library.apply_chat_template(messages[:first], add_generation_prompt=True)["input_ids"][1:]
    assert tokens[: len(asked)].tolist() == asked
    assert not counted[: len(asked)].any()
    assert counted[len(asked)]


def test_templates_that_change_what_was_said(folder, tokenizer):
    source = CHAT.replace("{{ m.content }}<|im_end|>\n{% endgen", "{{ m.content if loop.last else '...' }}{% endgen")
    template = chat.ChatTemplate(source, folder, tokenizer)
    assert conversations.segments(conversation(0), template)
    with pytest.raises(UserError, match="writes message 2 otherwise when others follow"):
        conversations.segments(conversation(1)[1:] + conversation(0), template)
    with pytest.raises(UserError, match="no message has the role 'assistant'"):
        conversations.segments([{"role": "user", "content": "hello"}], template)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("pack", ["stream", "best-fit"])
def test_answers_count(folder, tokenizer, tmp_path, kind, pack):
    talks = [conversation(number) for number in range(60)]
    text = tmp_path / f"talks.{kind}"
    if kind == "jsonl":
        text.write_text("\n".join(json.dumps({"messages": talk, "id": n}) for n, talk in enumerate(talks)))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"messages": talks, "id": [*range(60)]}), text)
    settings = {"messages_field": "messages", "tokenizer": str(folder), "pack": pack, "deduplicate": True}
    length = 64 if pack == "stream" else 512  # no document is cut
    prepare(configure(tmp_path, text, length, **settings))
    answers, expected, documents = [], [], 0
    for split in ("train", "heldout"):
        data = PackedDataset(tmp_path / "data" / split)
        numbers = np.arange(len(data))
        tokens, counted = data.read(numbers), data.flags(numbers, shards.LOSS)
        tail = data.index["tail"]["tokens"] if data.index["tail"] else 0
        share = int(counted.sum())
        assert data.index["counted"] == share if not tail else share <= data.index["counted"] <= share + tail
        answers.append(tokenizer.decode(tokens[counted].tolist()))
        documents += data.index["documents"]
        rows = only(arrange(tokens, left_to_right(length), data.index["bos_id"]), counted, 0.5)
        assert np.array_equal(rows.weights.numpy(), counted * 2.0)
    assert documents == 60
    said = "".join(answers)
    for talk in talks:
        expected = "".join(f"{m['content']}<|im_end|>\n" for m in talk if m["role"] == "assistant")
        whole = said if pack == "best-fit" else said + expected  # the tail of the stream is not among the samples
        assert all(line in whole for line in expected.splitlines(keepends=True))
    assert "user says" not in said
    assert "be kind" not in said
    assert "<|im_start|>" not in said


def test_prompts_do_not_count(folder, tokenizer, tmp_path):
    text = tmp_path / "pairs.jsonl"
    pairs = [{"question": f"What is {n}? ", "text": f"It is the number {n}."} for n in range(80)]
    text.write_text("\n".join(map(json.dumps, pairs)))
    prepare(configure(tmp_path, text, prompt_field="question", tokenizer=str(folder)))
    data = PackedDataset(tmp_path / "data/train")
    numbers = np.arange(len(data))
    tokens, counted = data.read(numbers), data.flags(numbers, shards.LOSS)
    said, asked = (tokenizer.decode(tokens[mask].tolist()) for mask in (counted, ~counted))
    assert "What" not in said
    assert "number" not in asked
    assert said.count("<|endoftext|>") == tokenizer.decode(tokens.ravel().tolist()).count("<|endoftext|>")


@pytest.mark.parametrize(
    ("content", "data", "line"),
    [
        ({"messages": [{"role": "assistant", "content": "N"}]}, {"tokenizer": None}, "needs a tokenizer with a chat"),
        ({"messages": [{"role": "user", "content": "N"}]}, {}, "no message has the role 'assistant'"),
        ({"messages": "hello"}, {}, "is not a list of messages with a role"),
        ({"text": "hello"}, {}, "not a JSON object with a field 'messages'; its fields: text"),
    ],
)
def test_bad_conversations_are_one_line(folder, tmp_path, content, data, line):
    text = tmp_path / "talks.jsonl"
    text.write_text("\n".join(json.dumps(content).replace("N", str(n)) for n in range(30)))
    with pytest.raises(UserError, match=line):
        prepare(configure(tmp_path, text, **{"messages_field": "messages", "tokenizer": str(folder), **data}))


def test_a_tokenizer_without_a_template_and_texts_without_fields(folder, tmp_path):
    plain = byte_level(tmp_path / "plain", SPECIAL, tokenizer_config={"eos_token": SPECIAL[0]})
    talks, words = tmp_path / "talks.jsonl", tmp_path / "words.txt"
    talks.write_text("\n".join(json.dumps({"messages": conversation(n)}) for n in range(30)))
    words.write_text("hello")
    with pytest.raises(UserError, match=r"put chat_template.jinja beside .*plain"):
        prepare(configure(tmp_path, talks, messages_field="messages", tokenizer=str(plain)))
    with pytest.raises(UserError, match="is a text file, which has no field 'messages'"):
        prepare(configure(tmp_path, words, messages_field="messages", tokenizer=str(folder), heldout_text=[str(talks)]))
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"messages": conversation(2)}))
    with pytest.raises(UserError, match=r"too few documents to hold some of them out whole"):
        prepare(configure(tmp_path, one, messages_field="messages", tokenizer=str(folder)))
    with pytest.raises(ValueError, match="cannot both be set"):
        configure(tmp_path, one, messages_field="messages", prompt_field="text")
