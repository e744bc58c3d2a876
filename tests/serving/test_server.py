"""The server as clients meet it: a real process, real connections, right answers, and all that clients do wrong."""

import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from armd_scale import inference
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.detokenizer import Detokenizer
from armd_scale.inference import FREE, Decoding

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Running:
    process: subprocess.Popen
    port: int
    told: bool = False
    """Whether a test has told it to end."""

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.read().decode()

    def post(self, body, content="application/json", path="/v1/completions"):
        """Status and parsed answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": content})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def metric(self, name):
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics"), flags=re.MULTILINE)
        return float(found[1]) if found else 0.0


@contextlib.contextmanager
def serving(model_dir, *words):
    """A server in its own process, on a free port; it must end by itself when told to."""
    process = subprocess.Popen(
        [sys.executable, "tools/serve.py", str(model_dir), "--port", "0", "--dtype", "float64", *map(str, words)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, (line, process.stderr.read() if process.poll() is not None else "")
        running = Running(process, int(found[1]))
        yield running
        if not running.told:
            assert process.poll() is None, process.stderr.read()
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors, errors
    finally:
        process.kill()


@pytest.fixture(scope="module")
def server(model_dir):
    with serving(model_dir) as running:
        yield running


@pytest.fixture(scope="module")
def own(model_dir):
    return inference.load(model_dir, dtype=torch.float64), tokenizers.load(model_dir)


def _expected(own, prompt, count, decoding, seed, rows=1, suffix=None):
    """Texts as this project's own code writes them."""
    model, tokenizer = own
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    behind = tokenizer.encode(suffix) if suffix is not None else []
    tasks = model.plan([tokens + [FREE] * count + behind] * rows, decoding, seed)
    texts = [text.tolist() for text in model.complete(tasks)]
    cut = [text[len(tokens) : len(text) - len(behind)] for text in texts]
    before = len(tokenizer.decode(tokens))
    return [tokenizer.decode([*tokens, *text])[before:] for text in cut]


def test_answers_are_the_models(server, own):
    model, tokenizer = own
    for fields, decoding in (
        ({"temperature": 0.8}, Decoding(temperature=0.8, stop=True)),
        ({"streams": 4, "top_p": 0.9, "top_k": 50}, Decoding(streams=4, top_p=0.9, top_k=50, stop=True)),
        ({"draft": 4, "min_p": 0.01}, Decoding(draft=4, min_p=0.01, stop=True)),
        ({"temperature": 0}, Decoding(temperature=0, stop=True)),
    ):
        body = {"prompt": "Return the ", "max_tokens": 20, "seed": 5, "n": 3, **fields}
        status, answer = server.post(body)
        assert status == 200
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts == _expected(own, "Return the ", 20, decoding, 5, rows=3)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        tokens = len(tokenizer.encode("Return the "))
        assert answer["usage"]["prompt_tokens"] == tokens
        assert answer["usage"]["total_tokens"] == tokens + answer["usage"]["completion_tokens"]
        assert server.post({**body, "echo": True})[1]["choices"][0]["text"] == "Return the " + texts[0]
    several = {"prompt": ["a", "of the "], "max_tokens": 5, "seed": 1, "stream": False}
    texts = [choice["text"] for choice in server.post(several)[1]["choices"]]
    model_texts = model.complete(
        model.plan([tokenizer.encode(p) + [FREE] * 5 for p in several["prompt"]], Decoding(stop=True), 1)
    )
    assert texts == [
        tokenizer.decode(t.tolist())[len(p) :] for p, t in zip(several["prompt"], model_texts, strict=True)
    ]
    by_tokens = server.post({"prompt": tokenizer.encode("of the "), "max_tokens": 5, "seed": 1})[1]
    assert by_tokens["choices"][0]["text"] == _expected(own, "of the ", 5, Decoding(stop=True), 1)[0]
    gap = {"prompt": "Return ", "suffix": " function", "max_tokens": 6, "seed": 2}
    assert (
        server.post(gap)[1]["choices"][0]["text"] == _expected(own, "Return ", 6, Decoding(), 2, suffix=" function")[0]
    )
    assert (
        server.post({"prompt": "a"})[1]["choices"][0]["text"] != server.post({"prompt": "a"})[1]["choices"][0]["text"]
    )


def _events(server, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions",
        json.dumps({**body, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        parts = answer.read().decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


@pytest.mark.parametrize("way", [{}, {"streams": 4}, {"draft": 3}])
def test_streams_add_up_to_the_answer(server, way):
    """Pieces by position, and with ``order`` every position once, in the order of generation."""
    body = {"prompt": "Return ", "max_tokens": 24, "seed": 7, "n": 2, **way}
    whole = server.post(body)[1]["choices"]
    for extra in ({}, {"order": True}):
        events = _events(server, {**body, **extra})
        for choice in whole:
            own = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
            assert "".join(one["text"] for one in own) == choice["text"]
            assert [one["finish_reason"] for one in own if one["finish_reason"]] == [choice["finish_reason"]]
            written = [place for one in own for place, _ in one.get("written", [])]
            assert len(set(written)) == len(written)
            if extra and way == {"streams": 4} and choice["finish_reason"] == "length":
                starts = [written[0] + 6 * stream for stream in range(4)]
                assert written == starts + [s + step for step in range(1, 6) for s in starts]


def test_stop_strings(server):
    body = {"prompt": "Return ", "max_tokens": 40, "seed": 3}
    whole = server.post(body)[1]["choices"][0]["text"]
    stop = whole[10:13]
    status, answer = server.post({**body, "stop": [stop, "never this"]})
    assert status == 200
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert (
        "".join(e["choices"][0]["text"] for e in _events(server, {**body, "stop": stop})) == whole[: whole.index(stop)]
    )


def test_pieces_of_characters_are_held_back(own):
    """A character of several byte tokens appears when it is whole, and a stop is found across pieces."""
    _, tokenizer = own
    for text in ("a 你好 b", "😀😀", "x ▁ y", " lead", "\n\n z "):
        tokens = tokenizer.encode(text)
        for size in (1, 2, 3):
            pieces = Detokenizer(tokenizer, [], [])
            parts = [tokens[at : at + size] for at in range(0, len(tokens), size)]
            out = [pieces.add(part, last=number == len(parts) - 1) for number, part in enumerate(parts)]
            assert "".join(out) == text
            assert not any("\ufffd" in part for part in out)
        for stop in {text[at : at + 2] for at in range(len(text) - 1)}:
            pieces = Detokenizer(tokenizer, [], [stop])
            out = [pieces.add([token], last=number == len(tokens) - 1) for number, token in enumerate(tokens)]
            assert "".join(out) == text[: text.index(stop)]
            assert pieces.stopped


WRONG = [
    (b"{", 400, "the request is not valid JSON: "),
    (b"\xff\xfe", 400, "the request is not valid JSON: "),
    (b"[]", 400, "the request must be a JSON object"),
    ({"promt": "x"}, 400, "promt: unknown field; fields: model, n, "),
    (
        {"prompt": 5},
        400,
        "prompt: must be a text, a list of texts, a list of tokens, or a list of lists of tokens; it is 5",
    ),
    ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens: must be a whole number of at least 0; it is -1"),
    ({"max_tokens": 0}, 400, "the prompt is empty and max_tokens is 0"),
    ({"prompt": "x", "temperature": "hot"}, 400, 'temperature: must be a number; it is "hot"'),
    ({"prompt": "x", "presence_penalty": 1}, 400, "presence_penalty: must be 0, as this server has no penalties"),
    ({"prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias: must be empty, as"),
    ({"prompt": "x", "stream_options": {"a": 1}}, 400, "stream_options.a: unknown field"),
    (b'{"prompt": "x", "top_k": 1' + b"0" * 400 + b"}", 400, "top_k: "),
    (b'{"prompt": "x", "max_tokens": ' + b"9" * 4300 + b"}", 400, "max_tokens: "),
    ({"prompt": "x", "order": True}, 400, "order: "),
    ({"a\nb": 1}, 400, "unknown field"),
    (b'{"prompt": "\\ud800"}', 400, "the request is not valid JSON: "),
    ({"prompt": "x", "max_tokens": 10**6}, 400, "takes up to 64: use at most 63"),
    ({"prompt": "x " * 500, "max_tokens": 2}, 400, "takes up to 64: shorten it"),
    ({"prompt": [1, 10**9], "max_tokens": 2}, 400, "token 1000000000 "),
    ({"prompt": [-1], "max_tokens": 2}, 400, "token -1 "),
    ({"prompt": [[]], "max_tokens": 2, "streams": 65}, 400, "up to 16 tokens"),
    ({"prompt": "x", "draft": -1}, 400, "draft must be"),
    ({"prompt": "x", "temperature": -1}, 400, "temperature must be"),
    ({"prompt": "x", "top_p": 0}, 400, "top_p must be"),
    ({"prompt": "x", "n": 100}, 400, "up to 64 texts"),
    ({"prompt": "x", "n": 0}, 400, "n: "),
    ({"prompt": "x", "logprobs": 21}, 400, "logprobs: must be a whole number from 0 to 20; it is 21"),
    ({"prompt": "x", "logprobs": 1, "stream": True}, 400, "logprobs: not available with stream=true"),
    ({"prompt": "x", "stop": ["a"] * 17}, 400, "stop: must be up to 16"),
    ({"prompt": "x", "stop": ""}, 400, "stop: must be up to 16"),
    ({"prompt": "x", "seed": 2**70}, 400, "seed: "),
    ({"prompt": "x", "model": "another"}, 400, "model: "),
    (b'{"prompt": "' + b"x" * (2 << 20) + b'"}', 413, "larger than"),
]


@pytest.mark.parametrize(("body", "status", "line"), WRONG)
def test_wrong_requests_are_one_line(server, body, status, line):
    got, answer = server.post(body)
    message = answer["error"]["message"]
    assert (got, "\n" in message) == (status, False)
    assert line in message


def test_wrong_places(server):
    assert server.post({}, content="text/plain")[0] == 415
    assert server.post({}, path="/v1/chat")[0] == 404
    with pytest.raises(urllib.error.HTTPError, match="405"):
        server.get("/v1/completions")
    assert json.loads(server.get("/health")) == {"status": "ok"}
    assert json.loads(server.get("/v1/models"))["data"][0]["max_tokens"] == 64
    assert "<title>armd_scale</title>" in server.get("/")
    assert server.metric('armd_requests_total{status="404"}') >= 1


def test_only_its_own_address_is_answered(server):
    """A foreign page that gives this machine a name of its own gets nothing, and none may frame the page."""

    async def status(host):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        found = await _status(reader)
        writer.close()
        return found

    for host, wanted in (("localhost", 200), (f"127.0.0.1:{server.port}", 200), ("[::1]:80", 200), ("evil.test", 400)):
        assert asyncio.run(status(host)) == wanted
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/") as answer:
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


def test_usage_at_the_end_of_a_stream(server):
    body = {"prompt": "Return ", "max_tokens": 9, "seed": 3, "n": 2, "temperature": None}
    *events, last = _events(server, {**body, "stream_options": {"include_usage": True}})
    assert last["choices"] == []
    assert last["usage"] == server.post(body)[1]["usage"]
    assert len([e for e in events if e["choices"][0]["finish_reason"]]) == 2


def test_texts_end_before_the_server_does(model_dir, own):
    """SIGTERM: what is in lanes is finished and answered; nothing new is taken."""
    body = {"prompt": "a", "max_tokens": 60, "seed": 5, "n": 40}
    expected = _expected(own, "a", 60, Decoding(stop=True), 5, rows=40)

    async def leave(server):
        reader, writer = await _send(server.port, json.dumps(body).encode())
        answer = asyncio.create_task(reader.read())
        while server.metric("armd_running") == 0 and not answer.done():
            await asyncio.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        head, _, rest = (await answer).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), [choice["text"] for choice in json.loads(rest)["choices"]]

    with serving(model_dir, "--lanes", 4, "--grace", 300) as server:
        server.told = True
        assert asyncio.run(leave(server)) == (200, expected)


def test_wrong_starts_are_one_line(model_dir, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, line in (
            ([tmp_path], "is not a model directory"),
            ([model_dir, "--port", taken.getsockname()[1]], "--port"),
            ([model_dir, "--lanes", 0], "--lanes"),
            ([model_dir, "--device", "cuda:9"], "cuda:9"),
        ):
            result = subprocess.run(
                [sys.executable, "tools/serve.py", *map(str, words)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
            assert line in result.stderr


def test_a_full_queue_is_told_and_nothing_waits_for_those_who_left(model_dir):
    """429 when the queue is full; clients that leave free their places."""

    async def crowd(port):
        body = json.dumps({"prompt": "a", "max_tokens": 60, "stream": True, "temperature": 1.5, "seed": 2}).encode()
        clients = [await _send(port, body) for _ in range(30)]
        statuses = [await _status(reader) for reader, _ in clients]
        for _, writer in clients:
            writer.close()
        return statuses

    with serving(model_dir, "--lanes", 1, "--queue", 3) as server:
        statuses = asyncio.run(crowd(server.port))
        assert set(statuses) == {200, 429}
        for _ in range(200):
            if server.metric("armd_waiting") == server.metric("armd_running") == 0:
                break
            time.sleep(0.05)
        assert server.metric("armd_waiting") == server.metric("armd_running") == 0
        assert server.post({"prompt": "a", "max_tokens": 2})[0] == 200


async def _send(port, body, headers=b"Content-Type: application/json\r\n"):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    length = f"Content-Length: {len(body)}\r\n".encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + headers + length + b"\r\n" + body
    )
    await writer.drain()
    return reader, writer


async def _status(reader):
    return int((await asyncio.wait_for(reader.readline(), 60)).split()[1])


def test_under_load(model_dir, own, pytestconfig):
    """200 clients, half of which leave midway, wrong requests among them; for a minute with ``--parity``.

    No crash, no leak of memory, files or lanes, and every answer that was accepted is right.
    """
    seconds = 60.0 if pytestconfig.getoption("--parity") else 5.0
    ways = [{}, {"streams": 4}, {"draft": 4}, {"streams": 8, "top_p": 0.9}, {"temperature": 0.5, "top_k": 20}]
    bodies, answers = [], []
    for number in range(25):
        body = {
            "prompt": "Return the class"[: 2 + number],
            "max_tokens": 20 + number,
            "seed": number,
            **ways[number % 5],
        }
        bodies.append(json.dumps(body).encode())
        decoding = Decoding(**ways[number % 5], stop=True)
        answers.append(_expected(own, body["prompt"], body["max_tokens"], decoding, number)[0])
    count = {"right": 0, "refused": 0, "busy": 0, "left": 0}

    async def client(port, number, end):
        chance = random.Random(number)
        while time.monotonic() < end:
            pick = chance.randrange(len(bodies))
            wrong = chance.random() < 0.15
            body = bodies[pick]
            if wrong:
                bad, status, _ = chance.choice(WRONG)
                body = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
            streamed = chance.random() < 0.5
            if streamed and not wrong:
                body = body[:-1] + b', "stream": true}'
            try:
                reader, writer = await _send(port, body)
            except ConnectionError:
                assert len(body) > 1 << 20  # refused before all of it was sent
                continue
            try:
                if number % 2 and chance.random() < 0.5:
                    await asyncio.wait_for(reader.read(chance.randrange(1, 300)), 60)
                    count["left"] += 1
                    continue
                raw = await asyncio.wait_for(reader.read(), 60)
            except ConnectionError:
                assert len(body) > 1 << 20
                continue
            finally:
                writer.close()
            head, _, rest = raw.partition(b"\r\n\r\n")
            got = int(head.split()[1])
            if wrong:
                assert got in (status, 429)
                count["refused"] += 1
            elif got == 429:
                count["busy"] += 1
                await asyncio.sleep(0.2)
            else:
                assert got == 200, raw
                assert _text(head, rest, streamed) == answers[pick]
                count["right"] += 1

    async def everybody(port, clients, length):
        end = time.monotonic() + length
        await asyncio.gather(*(client(port, number, end) for number in range(clients)))

    def held(server):
        folder = Path(f"/proc/{server.process.pid}")
        memory = next(row for row in (folder / "status").read_text().splitlines() if row.startswith("VmRSS"))
        return int(memory.split()[1]) / 1024, len(list((folder / "fd").iterdir()))

    with serving(model_dir, "--lanes", 16, "--queue", 96) as server:
        asyncio.run(everybody(server.port, 200, seconds / 3))  # buffers and threads have their size after this
        idle = _idle(server)
        memory, files = held(server)
        asyncio.run(everybody(server.port, 200, seconds))
        assert idle == _idle(server) == (0, 0)
        grown, more = held(server)
        assert more <= files + 2
        assert grown < memory + 40, f"{memory:.0f} MB before, {grown:.0f} MB after"
        assert json.loads(server.get("/health")) == {"status": "ok"}
    print(f"{count}; {memory:.0f} -> {grown:.0f} MB, {files} -> {more} files")
    assert count["right"] > 20
    assert count["refused"] > 5
    assert count["left"] > 20


def _idle(server):
    for _ in range(400):
        found = server.metric("armd_waiting"), server.metric("armd_running")
        if found == (0, 0):
            break
        time.sleep(0.05)
    return found


def _text(head, body, streamed):
    if b"chunked" in head:
        parts, rest = [], body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            parts.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        body = b"".join(parts)
    if not streamed:
        return json.loads(body)["choices"][0]["text"]
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    assert lines[-1] == b"[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
