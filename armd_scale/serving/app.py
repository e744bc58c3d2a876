"""The HTTP interface: OpenAI-compatible completions, health, metrics and a page.

``POST /v1/completions`` takes the OpenAI fields ``prompt`` (text or tokens, or a list of prompts), ``max_tokens``,
``n``, ``temperature``, ``top_p``, ``stop``, ``seed``, ``echo``, ``stream`` and ``suffix`` (the model fills the gap
between prompt and suffix). Additional fields are ``top_k``, ``min_p``, ``streams``, ``draft``, ``steps``, ``block``,
``confidence`` and ``order`` (with ``stream``: every event holds the positions that a step wrote). A bad request gets an
error message of a line with status 400, 408, 413, 415 or 429.
"""

import asyncio
import itertools
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from armd_scale.data.detokenizer import Detokenizer
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.decoding.lanes import STRATEGIES
from armd_scale.inference import ARMD, FREE, Decoding, InputError, Task
from armd_scale.serving.scheduler import STOPPING, Busy, Event, Job, Scheduler, Stopping

BODY = 1 << 20
"""Largest size of a request in bytes."""
_PATIENCE = 30  # seconds in which a request must arrive
_PAGE = Path(__file__).with_name("page.html")
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'"
)


_Token = Annotated[int, Field(ge=-(2**31), lt=2**31)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class Completion(BaseModel):
    """The body of a completion request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | list[str] | list[_Token] | list[list[_Token]] = ""
    suffix: str | None = None
    max_tokens: int = Field(16, ge=1, le=2**31)
    n: int = Field(1, ge=1, le=128)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(0, ge=0, le=2**31)
    min_p: float = 0.0
    streams: int = 1
    draft: int = 0
    steps: int = 0
    block: int = 0
    confidence: float = 0.9
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    echo: bool = False
    stream: bool = False
    order: bool = False
    model: str | None = None
    user: str | None = None
    stream_options: StreamOptions | None = None
    # OpenAI fields without an effect here; any value but the default is refused.
    best_of: Literal[1] | None = None
    logprobs: None = None
    logit_bias: None = None
    presence_penalty: float | None = Field(0, ge=0, le=0)
    frequency_penalty: float | None = Field(0, ge=0, le=0)

    @property
    def stops(self) -> list[str]:
        """Stop strings; the text ends before the first of them."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, fields: Any) -> Any:
        return (
            {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields
        )


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """Answers HTTP requests with a model and a scheduler."""

    def __init__(
        self, model: ARMD, tokenizer: Tokenizer, name: str, lanes: int = 8, queue: int = 64, step_tokens: int = 16
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.registry = CollectorRegistry()
        registry = self.registry
        self._answers = Counter("armd_requests", "Requests by status", ["status"], registry=registry)
        self._tokens = Counter("armd_tokens", "Tokens generated", registry=registry)
        self._steps = Counter("armd_steps", "Decoding steps", registry=registry)
        times = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        self._first = Histogram("armd_first_token_seconds", "Until the first text", buckets=times, registry=registry)
        self._seconds = Histogram("armd_request_seconds", "Of accepted requests", buckets=times, registry=registry)

        def count(tokens: int) -> None:
            self._steps.inc()
            self._tokens.inc(tokens)

        self.scheduler = Scheduler(model, lanes, queue, step_tokens, count)
        Gauge("armd_waiting", "Texts in the queue", registry=registry).set_function(lambda: self.scheduler.waiting)
        Gauge("armd_running", "Texts in lanes", registry=registry).set_function(lambda: self.scheduler.running)
        self._routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]

    def app(self, hosts: list[str] | None = None) -> Starlette:
        """The ASGI application; ``hosts``: accepted Host headers (None: all).

        Checking the Host header prevents DNS rebinding, by which a foreign web page could reach a local server.
        """
        handlers: Any = {HTTPException: self._http_error}
        guard = Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["*"], www_redirect=False)
        return Starlette(routes=self._routes, middleware=[guard], exception_handlers=handlers)

    async def _page(self, _: Request) -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=headers)

    async def _health(self, _: Request) -> Response:
        alive = self.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, status_code=200 if alive else 503)

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    async def _models(self, _: Request) -> Response:
        c = self.model.config
        facts = {"id": self.name, "object": "model", "owned_by": "armd_scale", "max_tokens": c.length}
        facts["objective"] = c.objective
        return JSONResponse({"object": "list", "data": [facts]})

    async def _http_error(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return self._error(error.status_code, f"{error.detail}: use /v1/completions, /v1/models, /health or /metrics")

    def _error(self, status: int, message: str) -> Response:
        self._answers.labels(status).inc()
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        return JSONResponse(body, status, headers={"Retry-After": "1"} if status == 429 else None)

    async def _completions(self, request: Request) -> Response:
        try:
            completion = await self._read(request)
            tasks = self._tasks(completion)
            jobs = self.scheduler.submit(tasks)
        except Refused as error:
            return self._error(error.status, str(error))
        except InputError as error:
            return self._error(400, str(error))
        except Busy:
            return self._error(429, "the queue is full: retry later")
        except Stopping:
            return self._error(503, STOPPING)
        except ClientDisconnect:
            self._answers.labels(499).inc()
            return Response(status_code=499)
        texts = [Detokenizer(self.tokenizer, self._before(job.task), completion.stops) for job in jobs]
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        head["object"] = "text_completion"
        if completion.stream:
            events = self._events(completion, jobs, texts, head)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await self._whole(request, completion, jobs, texts, head)

    async def _read(self, request: Request) -> Completion:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "send JSON, with Content-Type: application/json")
        body = bytearray()
        try:
            async with asyncio.timeout(_PATIENCE):
                async for part in request.stream():
                    body += part
                    if len(body) > BODY:
                        raise Refused(413, f"the request is larger than {BODY:,} bytes")
        except TimeoutError as error:
            raise Refused(408, f"the request did not arrive within {_PATIENCE} seconds") from error
        try:
            completion = Completion.model_validate_json(bytes(body))
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(repr(part)[1:-1][:60] for part in first["loc"][:1] if isinstance(part, str))
            known = f"; fields: {', '.join(Completion.model_fields)}" if first["type"] == "extra_forbidden" else ""
            raise Refused(400, f"{where or 'the request'}: {first['msg'].lower()}{known}") from error
        if completion.model not in (None, self.name):
            raise Refused(400, f"model: this server has '{self.name}', not {completion.model[:100]!r}")
        if completion.order and not completion.stream:
            raise Refused(400, "order: needs stream=true")
        if len(completion.stops) > 4 or not all(0 < len(stop) <= 256 for stop in completion.stops):
            raise Refused(400, "stop: up to 4 strings of 1 to 256 characters")
        return completion

    def _tasks(self, completion: Completion) -> list[Task]:
        """The tasks of a request, ``n`` for each prompt. Raises ``Refused`` and ``InputError``."""
        prompt: Any = completion.prompt
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        prompts = prompt if several else [prompt]
        decoding = Decoding(
            completion.streams,
            completion.draft,
            completion.temperature,
            completion.top_k,
            completion.top_p,
            completion.min_p,
            completion.steps,
            completion.suffix is None,
            completion.block,
            completion.confidence,
        )
        if STRATEGIES[decoding.strategy].targets(decoding) > self.scheduler.step_tokens:
            raise Refused(
                400, f"this server decodes up to {self.scheduler.step_tokens} tokens a step (streams, draft, block)"
            )
        if len(prompts) * completion.n > self.scheduler.queue:
            raise Refused(400, f"a request may ask for up to {self.scheduler.queue} texts")
        after = self.tokenizer.encode(completion.suffix) if completion.suffix is not None else []
        rows = []
        for prompt in prompts:
            tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            if any(token < 0 for token in tokens):
                raise Refused(400, f"prompt: token {min(tokens)} is not in the vocabulary")
            size = len(tokens) + completion.max_tokens + len(after)
            if size > self.model.config.length:
                raise Refused(
                    400,
                    f"prompt, suffix and max_tokens are {size} tokens together but this model takes up to "
                    f"{self.model.config.length}: lower max_tokens",
                )
            rows += [tokens + [FREE] * completion.max_tokens + after] * completion.n
        seed = secrets.randbits(62) if completion.seed is None else completion.seed
        return self.model.plan(rows, decoding, seed)

    def _before(self, task: Task) -> list[int]:
        """Tokens before the first generated token."""
        return list(itertools.takewhile(lambda token: token != FREE, task.tokens))

    async def _whole(
        self, request: Request, completion: Completion, jobs: list[Job], texts: list[Detokenizer], head: dict[str, Any]
    ) -> Response:
        async def disconnected() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        watcher = asyncio.create_task(disconnected())
        parts = [asyncio.create_task(self._collect(job, text)) for job, text in zip(jobs, texts, strict=True)]
        together = asyncio.create_task(asyncio.wait(parts))
        try:
            await asyncio.wait([watcher, together], return_when=asyncio.FIRST_COMPLETED)
            if not all(part.done() for part in parts):
                self._answers.labels(499).inc()
                return Response(status_code=499)
            failed = [part.exception() for part in parts if part.exception()]
            if failed:
                return self._error(503 if str(failed[0]) == STOPPING else 500, str(failed[0]))
            results = [part.result() for part in parts]
        finally:
            for pending in (watcher, together, *parts):
                pending.cancel()
            self.scheduler.cancel(jobs)
        choices = [
            _choice(index, self._echo(completion, job) + text, reason)
            for index, (job, (text, reason, _)) in enumerate(zip(jobs, results, strict=True))
        ]
        usage = self._usage(completion, jobs, sum(count for _, _, count in results))
        self._answers.labels(200).inc()
        self._seconds.observe(time.perf_counter() - jobs[0].submitted)
        return JSONResponse({**head, "choices": choices, "usage": usage})

    def _usage(self, completion: Completion, jobs: list[Job], count: int) -> dict[str, int]:
        asked = sum(len(self._before(job.task)) for job in jobs[:: completion.n])
        return {"prompt_tokens": asked, "completion_tokens": count, "total_tokens": asked + count}

    async def _collect(self, job: Job, text: Detokenizer) -> tuple[str, str, int]:
        """Text, finish reason and number of tokens of a job. Raises ``RuntimeError`` if the job failed."""
        out, count = "", 0
        while True:
            event = await job.events.get()
            if event.error:
                raise RuntimeError(event.error)
            count += len(event.fresh)
            out += text.add(event.fresh, event.done)
            if event.done or text.stopped:
                self.scheduler.cancel([job])
                return out, self._reason(job, text), count

    def _reason(self, job: Job, text: Detokenizer) -> str:
        return "stop" if text.stopped or job.frontier.stopped else "length"

    def _echo(self, completion: Completion, job: Job) -> str:
        return self.tokenizer.decode(self._before(job.task)) if completion.echo else ""

    async def _events(
        self, completion: Completion, jobs: list[Job], texts: list[Detokenizer], head: dict[str, Any]
    ) -> AsyncIterator[str]:
        """Server-sent events with the text that becomes complete in a step."""
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        async def forward(index: int, job: Job) -> None:
            while True:
                event = await job.events.get()
                await queue.put((index, event))
                if event.done or event.error:
                    return

        readers = [asyncio.create_task(forward(index, job)) for index, job in enumerate(jobs)]
        open_, status = set(range(len(jobs))), 499
        started, first, count = jobs[0].submitted, True, 0
        try:
            if completion.echo:
                for index, job in enumerate(jobs):
                    yield _line({**head, "choices": [_choice(index, self._echo(completion, job), None)]})
            while open_:
                index, event = await queue.get()
                if index not in open_:
                    continue
                if event.error:
                    status = 500
                    yield _line({"error": {"message": event.error, "type": "server_error"}})
                    return
                count += len(event.fresh)
                text = texts[index].add(event.fresh, event.done)
                over = event.done or texts[index].stopped
                choice = _choice(index, text, self._reason(jobs[index], texts[index]) if over else None)
                if completion.order:
                    choice["written"] = [[pos, self.tokenizer.decode([token])] for pos, token in event.written]
                if over:
                    open_.discard(index)
                    self.scheduler.cancel([jobs[index]])
                if text or over or completion.order:
                    if first:
                        self._first.observe(time.perf_counter() - started)
                        first = False
                    yield _line({**head, "choices": [choice]})
            if completion.stream_options and completion.stream_options.include_usage:
                yield _line({**head, "choices": [], "usage": self._usage(completion, jobs, count)})
            status = 200
            yield "data: [DONE]\n\n"
        finally:
            self._answers.labels(status).inc()
            self._seconds.observe(time.perf_counter() - started)
            for reader in readers:
                reader.cancel()
            self.scheduler.cancel(jobs)


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": reason, "logprobs": None}


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
