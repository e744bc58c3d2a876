"""What clients of OpenAI's interface ask for, against the library: log-probabilities, echo, chats, names."""

import contextlib
import json
import shutil
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
import uvicorn

from armd_scale import inference
from armd_scale.data import chat
from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError
from armd_scale.inference import FREE, Decoding
from armd_scale.serving.app import Server
from tests.conftest import BASELINES, model_folder

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n  {% generation %}{{ m['role'] + ': ' + m['content'] | trim }}"
    "{% endgeneration %}\n{{ eos_token }}{% endfor %}"
    "{% if messages[0].role != 'user' %}{{ raise_exception('the first message must be of the user') }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Client:
    def __init__(self, folder, port):
        self.model = inference.load(folder, dtype=torch.float64)
        self.tokenizer = tokenizers.load(folder)
        self._port = port

    def ask(self, path, body=None, content="application/json"):
        """Status, and the parsed answer or the events of a stream."""
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": content}
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read().decode()
                if not answer.headers["Content-Type"].startswith("text/event-stream"):
                    return answer.status, json.loads(text)
                lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
                assert lines.pop() == "[DONE]"
                return answer.status, list(map(json.loads, lines))
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]["message"]

    def complete(self, **body):
        status, answer = self.ask("/v1/completions", {"seed": 3, **body})
        assert status == 200, answer
        return answer["choices"]

    def talk(self, *messages, **body):
        messages = [{"role": role, "content": content} for role, content in messages]
        return self.ask("/v1/chat/completions", {"messages": messages, "seed": 3, **body})


@contextlib.contextmanager
def serving(folder):
    """A server in a thread of this process."""
    server = Server(inference.load(folder, dtype=torch.float64), tokenizers.load(folder), "a/name", lanes=4, queue=64)
    running = uvicorn.Server(uvicorn.Config(server.app(), port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield Client(folder, running.servers[0].sockets[0].getsockname()[1])
    finally:
        server.scheduler.close(5)
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(model_dir):
    with serving(model_dir) as client:
        yield client


@pytest.fixture(scope="module", params=["ar", "card", "mdm"])
def other(request, model_dir, tmp_path_factory):
    """A model of another objective."""
    shape = BASELINES[request.param].model_copy(update={"length": 64})
    folder = model_folder(tmp_path_factory.mktemp(request.param), shape, tokenizers.load(model_dir))
    with serving(folder) as client:
        yield client


@pytest.fixture(scope="module")
def talker(model_dir, tmp_path_factory):
    """The model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "m"
    shutil.copytree(model_dir, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with serving(folder) as client:
        yield client


def scores(client, tokens, order=None, blocks=None):
    """log p of each token by the library, and of all tokens in its place."""
    order, blocks = (None if each is None else torch.tensor(each) for each in (order, blocks))
    rows = torch.tensor([tokens])
    own = -client.model.nll(rows, order, blocks)[0]
    return own.tolist(), client.model.logits(rows, order, blocks)[0].log_softmax(-1)


TEXT = "Return the class of 你好, x"


@pytest.mark.parametrize("bos", [False, True], ids=["text", "tokens-with-bos"])
@pytest.mark.parametrize("top", [0, 1, 5])
@pytest.mark.parametrize("count", [0, 1])
def test_a_given_text_is_scored_as_the_library_does(client, bos, top, count):
    """The request of lm-evaluation-harness for a loglikelihood."""
    tokens = client.tokenizer.encode(TEXT)
    prompt = [client.tokenizer.bos_id, *tokens] if bos else TEXT
    [choice] = client.complete(prompt=prompt, max_tokens=count, echo=True, logprobs=top, temperature=0)
    found = choice["logprobs"]
    own, all_scores = scores(client, tokens)
    assert choice["text"][: len(TEXT)] == TEXT
    assert choice["finish_reason"] == "length"
    if bos:
        assert found["token_logprobs"].pop(0) is None
        assert found["tokens"].pop(0) == "<s>"
        assert found["text_offset"].pop(0) == 0
    assert found["token_logprobs"][: len(tokens)] == pytest.approx(own, abs=1e-9)
    assert len(found["token_logprobs"]) == len(found["tokens"]) == len(found["text_offset"]) == len(tokens) + count
    starts = [len(client.tokenizer.decode(tokens[:at]).rstrip("\ufffd")) for at in range(len(tokens))]
    assert found["text_offset"][: len(tokens)] == starts
    if not top:
        assert found["top_logprobs"] is None
        return
    best = found["top_logprobs"][bos:]
    for row, (value, listed) in enumerate(zip(own, best, strict=False)):
        assert max(listed.values()) == pytest.approx(float(all_scores[row].max()), abs=1e-9)
        assert top <= len(listed) <= top + 1
        assert value == pytest.approx(listed[found["tokens"][row]], abs=1e-9)


@pytest.mark.parametrize(
    "way", [{}, {"streams": 4}, {"draft": 3}, {"streams": 2, "draft": 2}, {"temperature": 0.5, "top_k": 3}]
)
@pytest.mark.parametrize("echo", [False, True])
def test_generated_tokens_are_scored_in_the_order_of_generation(client, way, echo):
    prompt = client.tokenizer.encode("Return ")
    choices = client.complete(prompt="Return ", max_tokens=12, logprobs=1, n=2, echo=echo, **way)
    tasks = client.model.plan([prompt + [FREE] * 12] * 2, Decoding(**way, stop=True), 3)
    for choice, task, text in zip(choices, tasks, client.model.complete(tasks), strict=True):
        tokens = text.tolist()
        order = [*task.given, *(position for position in task.order if position <= len(tokens))]
        numbers = {p: len(prompt) + n for n, block in enumerate(task.blocks, start=1) for p in block}
        blocks = [numbers.get(position, position) for position in order]
        own, _ = scores(client, tokens, order, blocks)
        wanted = own if echo else own[len(prompt) :]
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted, abs=1e-9)


def test_eos_is_the_last_token(client):
    """The harness leaves out the last entry, which it takes for the generated token."""
    seeds = range(400)
    ended = (
        choice
        for seed in seeds
        for choice in client.complete(prompt="Return ", max_tokens=9, seed=seed, n=32, logprobs=0, echo=True)
        if choice["finish_reason"] == "stop"
    )
    choice = next(ended)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][-1] == "</s>"
    tokens = client.tokenizer.encode("Return ")
    own, _ = scores(client, tokens)
    assert logprobs["token_logprobs"][: len(tokens)] == pytest.approx(own, abs=1e-9)
    assert len(logprobs["tokens"]) > len(tokens)


def test_tokens_behind_a_stop_string_are_left_out(client):
    [whole] = client.complete(prompt="Return ", max_tokens=30, logprobs=1)
    stop = whole["text"][10:12]
    [choice] = client.complete(prompt="Return ", max_tokens=30, logprobs=1, stop=stop)
    assert choice["text"] == whole["text"][: whole["text"].index(stop)]
    size = len(choice["logprobs"]["tokens"])
    assert all(offset < len(choice["text"]) for offset in choice["logprobs"]["text_offset"])
    assert whole["logprobs"]["text_offset"][size] >= len(choice["text"])
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(whole["logprobs"]["token_logprobs"][:size], abs=1e-9)


def test_a_gap_is_scored_given_both_sides(client):
    [choice] = client.complete(prompt="Return ", suffix=" function", max_tokens=5, logprobs=0)
    before, after = (client.tokenizer.encode(text) for text in ("Return ", " function"))
    tasks = client.model.plan([before + [FREE] * 5 + after], Decoding(), 3)
    tokens = client.model.complete(tasks)[0].tolist()
    own = client.model.conditional_nll(tokens, tasks[0].order, tasks[0].given)[0]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx((-own).tolist(), abs=1e-9)


def test_other_objectives(other):
    """One causal stream is scored left to right; a model without an exact likelihood is refused."""
    body = {"prompt": TEXT, "max_tokens": 3, "echo": True, "logprobs": 2, "temperature": 0}
    if not other.model.config.traits.exact:
        status, line = other.ask("/v1/completions", body)
        assert (status, line.partition(":")[0]) == (400, "logprobs")
        assert "no exact likelihood" in line
        return
    tokens = other.tokenizer.encode(TEXT)
    [choice] = other.complete(**body)
    assert choice["logprobs"]["token_logprobs"][: len(tokens)] == pytest.approx(scores(other, tokens)[0], abs=1e-9)
    assert len(choice["logprobs"]["tokens"]) == len(tokens) + 3


def test_a_bos_is_not_doubled(client):
    tokens = client.tokenizer.encode("Return the ")
    texts = [
        client.complete(prompt=prompt, max_tokens=20)[0]["text"]
        for prompt in (tokens, [client.tokenizer.bos_id, *tokens], "Return the ")
    ]
    assert len(set(texts)) == 1


def test_nothing_is_generated(client):
    """All of the model's length can be given."""
    tokens = [5] * client.model.config.length
    assert client.complete(prompt=tokens, max_tokens=0)[0]["text"] == ""
    status, answer = client.ask("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 0, "stream": True})
    assert status == 200
    assert [event["choices"][0]["finish_reason"] for event in answer] == ["length"] * 2


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/a/name", "/v1/models/a%2Fname"])
def test_models(client, path):
    status, facts = client.ask(path)
    facts = facts["data"][0] if "data" in facts else facts
    assert (status, facts["id"], facts["object"]) == (200, "a/name", "model")
    assert abs(facts["created"] - time.time()) < 600


def test_another_model(client):
    assert client.ask("/v1/models/other") == (404, "model: this server has 'a/name', not 'other'")
    assert client.ask("/v1/completions", {"model": "a/name", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("content", ["Application/JSON", "application/json; charset=UTF-8", "APPLICATION/JSON ;x=y"])
def test_content_types(client, content):
    assert client.ask("/v1/completions", {"prompt": "x", "max_tokens": 1}, content)[0] == 200


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        ([("user", " the dog ")], "user: the dog</s>assistant:"),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "user: a</s>assistant: b</s>user: c</s>assistant:"),
        ([("user", "a"), ("assistant", None), ("user", "c")], "user: a</s>assistant: </s>user: c</s>assistant:"),
        (
            [("user", [{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}])],
            "user: the dog</s>assistant:",
        ),
    ],
)
@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_chat_is_its_rendered_text(talker, messages, rendered, limit):
    """Control tokens of the template are tokens; its BOS is not doubled."""
    encode = talker.tokenizer.encode
    parts = [[*encode(part), talker.tokenizer.eos_id] for part in rendered.split("</s>")]
    prompt = [token for part in parts for token in part][:-1]
    status, answer = talker.talk(*messages, **{limit: 8})
    assert status == 200, answer
    [choice] = answer["choices"]
    [wanted] = talker.complete(prompt=prompt, max_tokens=8)
    assert choice["message"] == {"role": "assistant", "content": wanted["text"], "refusal": None}
    assert choice["finish_reason"] == wanted["finish_reason"]
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_a_chat_may_fill_the_length(talker):
    _, answer = talker.talk(("user", "x"))
    usage = answer["usage"]
    ended = answer["choices"][0]["finish_reason"] == "stop"
    assert ended or usage["total_tokens"] == talker.model.config.length


def test_chat_streams(talker):
    _, answer = talker.talk(("user", "the dog"), max_tokens=9, n=2)
    options = {"stream_options": {"include_usage": True}}
    status, events = talker.talk(("user", "the dog"), max_tokens=9, n=2, stream=True, **options)
    assert status == 200
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events.pop()["usage"] == answer["usage"]
    for choice in answer["choices"]:
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


def test_chat_logprobs(talker):
    _, answer = talker.talk(("user", "the dog"), max_tokens=6, logprobs=True, top_logprobs=2)
    entries = answer["choices"][0]["logprobs"]["content"]
    prompt = [
        *talker.tokenizer.encode("user: the dog"),
        talker.tokenizer.eos_id,
        *talker.tokenizer.encode("assistant:"),
    ]
    [plain] = talker.complete(prompt=prompt, max_tokens=6, logprobs=2)
    assert [entry["logprob"] for entry in entries] == plain["logprobs"]["token_logprobs"]
    for entry, best in zip(entries, plain["logprobs"]["top_logprobs"], strict=True):
        assert len(entry["top_logprobs"]) == 2
        assert max(best.values()) == entry["top_logprobs"][0]["logprob"]
        assert bytes(entry["bytes"]).decode() == entry["token"]


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ({}, "messages: missing; it must be a list of messages"),
        ({"messages": []}, "messages: must be a list of messages, such as"),
        ({"messages": "hello"}, "messages: must be a list of messages, such as"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages: content must be text"),
        ({"messages": [{"role": "system", "content": "x"}]}, "the first message must be of the user"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs: needs logprobs=true"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools: must be empty, as"),
        ({"messages": [{"role": "user", "content": "x" * 99}]}, "takes up to 64: shorten it"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 99}, "max_tokens: 99 are too many"),
        ({"messages": [{"role": "user", "content": "x"}], "prompt": "x"}, "prompt: unknown field"),
    ],
)
def test_refused_chats(talker, body, line):
    status, message = talker.ask("/v1/chat/completions", body)
    assert status == 400
    assert line in message
    assert "\n" not in message


def test_a_model_without_a_template(client):
    assert client.talk(("user", "x")) == (400, "'a/name' has no chat template: use /v1/completions")


@pytest.mark.parametrize(
    "content",
    [
        {"chat_template": "one {{ bos_token }}"},
        {"chat_template": [{"name": "tools", "template": "two"}, {"name": "default", "template": "one <s>"}]},
    ],
)
def test_templates_in_the_tokenizers_settings(model_dir, tmp_path, content):
    folder = tmp_path / "m"
    shutil.copytree(model_dir, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **content}))
    assert chat.load(tokenizers.load(folder)).render([]) == "one <s>"


def test_a_broken_template_is_named(model_dir, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(model_dir, folder)
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match=r"chat_template.jinja cannot be read"):
        chat.load(tokenizers.load(folder))
