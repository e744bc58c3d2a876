"""The HTTP interface: OpenAI-compatible completions and chats, health, metrics and a page.

``POST /v1/completions`` and ``POST /v1/chat/completions`` take OpenAI's fields (``serving/requests.py``). Additional
fields are those of ``Decoding`` and ``order`` (with ``stream``: every event holds the positions that a step wrote). A
bad request gets an error message of a line with status 400, 404, 408, 413, 415 or 429.
"""

import asyncio
import itertools
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from armd_scale.data import chat
from armd_scale.data.detokenizer import Detokenizer
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.decoding.lanes import STRATEGIES
from armd_scale.errors import UserError
from armd_scale.inference import ARMD, FREE, Decoding, InputError, Task
from armd_scale.serving.answers import ChatForm, CompletionForm, Result
from armd_scale.serving.connections import PATIENCE
from armd_scale.serving.logprobs import Pieces, Scored
from armd_scale.serving.requests import BODY, Chat, Completion, Refused, parse
from armd_scale.serving.scheduler import STOPPING, Busy, Event, Job, Scheduler, Stopping

_PAGE = Path(__file__).with_name("page.html")
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'"
)


class Server:
    """Answers HTTP requests with a model and a scheduler. ``name``: the model's name for clients."""

    def __init__(
        self, model: ARMD, tokenizer: Tokenizer, name: str, lanes: int = 8, queue: int = 64, step_tokens: int = 16
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.template = chat.load(tokenizer)
        self._pieces = Pieces(tokenizer)
        self._created = int(time.time())
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
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chats, methods=["POST"]),
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

    @property
    def _facts(self) -> dict[str, Any]:
        c = self.model.config
        facts = {"id": self.name, "object": "model", "created": self._created, "owned_by": "armd_scale"}
        return {**facts, "max_tokens": c.length, "objective": c.objective}

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._facts]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(self._facts) if name == self.name else self._error(404, self._other_model(name))

    def _other_model(self, name: str) -> str:
        return f"model: this server has '{self.name}', not {name[:100]!r}"

    async def _http_error(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        paths = "/v1/completions, /v1/chat/completions, /v1/models, /health or /metrics"
        return self._error(error.status_code, f"{error.detail}: use {paths}")

    def _error(self, status: int, message: str) -> Response:
        self._answers.labels(status).inc()
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        return JSONResponse(body, status, headers={"Retry-After": "1"} if status == 429 else None)

    async def _completions(self, request: Request) -> Response:
        return await self._respond(request, lambda body: parse(Completion, body), CompletionForm())

    async def _chats(self, request: Request) -> Response:
        return await self._respond(request, lambda body: self._chat(parse(Chat, body)), ChatForm())

    def _chat(self, body: Chat) -> Completion:
        """The completion of the messages of a chat, as the template writes them."""
        if self.template is None:
            raise Refused(400, f"'{self.name}' has no chat template: use /v1/completions")
        try:
            text = self.template.render([message.plain() for message in body.messages])
        except UserError as error:
            raise Refused(400, str(error)) from error
        prompt = self.tokenizer.encode_with_special(text)
        return body.completion(prompt, self.model.config.length - len(self.model.without_bos(prompt)))

    async def _respond(self, request: Request, read: Callable[[bytes], Completion], form: CompletionForm) -> Response:
        try:
            return await self._answer(request, read(await self._body(request)), form)
        except Refused as error:
            return self._error(error.status, str(error))
        except ClientDisconnect:
            self._answers.labels(499).inc()
            return Response(status_code=499)

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "send JSON, with Content-Type: application/json")
        body = bytearray()
        try:
            async with asyncio.timeout(PATIENCE):
                async for part in request.stream():
                    body += part
                    if len(body) > BODY:
                        raise Refused(413, f"the request is larger than {BODY:,} bytes")
        except TimeoutError as error:
            raise Refused(408, f"the request did not arrive within {PATIENCE:.0f} seconds") from error
        return bytes(body)

    async def _answer(self, request: Request, completion: Completion, form: CompletionForm) -> Response:
        """Queue the texts of a request, and answer with them. Raises ``Refused``."""
        if completion.model not in (None, self.name):
            raise Refused(400, self._other_model(completion.model or ""))
        if completion.logprobs is not None and not self.model.config.traits.exact:
            label = self.model.config.traits.label
            raise Refused(400, f"logprobs: {label} models have no exact likelihood: leave out logprobs")
        prompts = self._prompts(completion)
        try:
            jobs = self.scheduler.submit(self._tasks(completion, prompts))
        except InputError as error:
            raise Refused(400, str(error)) from error
        except Busy as error:
            raise Refused(429, "the queue is full: retry later") from error
        except Stopping as error:
            raise Refused(503, STOPPING) from error
        texts = [Detokenizer(self.tokenizer, self._before(job.task), completion.stops) for job in jobs]
        head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if completion.stream:
            events = self._events(completion, jobs, texts, {**head, "object": form.part_kind}, form)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        begun = [bool(prompt) and prompt[0] == self.model.config.bos_id for prompt in prompts]
        headed = [begins for begins in begun for _ in range(completion.n)]
        return await self._whole(request, completion, jobs, texts, headed, {**head, "object": form.kind}, form)

    def _prompts(self, completion: Completion) -> list[list[int]]:
        """Tokens of the prompts of a request, with a BOS at the head where the client has sent one."""
        prompt: Any = completion.prompt
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        prompts = prompt if several else [prompt]
        tokens = [self.tokenizer.encode(one) if isinstance(one, str) else list(one) for one in prompts]
        if any(token < 0 for row in tokens for token in row):
            raise Refused(400, f"prompt: token {min(map(min, filter(None, tokens)))} is not in the vocabulary")
        return tokens

    def _tasks(self, completion: Completion, prompts: Sequence[list[int]]) -> list[Task]:
        """The tasks of a request, ``n`` for each prompt. Raises ``Refused`` and ``InputError``."""
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
        count, rows = completion.max_tokens, []
        for prompt in prompts:
            given = self.model.without_bos(prompt)
            self._check_size(len(given) + len(after), count)
            rows += [given + [FREE] * count + after] * completion.n
        seed = secrets.randbits(62) if completion.seed is None else completion.seed
        return self.model.plan(rows, decoding, seed)

    def _check_size(self, given: int, count: int) -> None:
        """``Refused`` unless a text of ``given`` tokens and ``count`` new ones fits the model."""
        longest = self.model.config.length
        if given + count == 0:
            raise Refused(400, "the prompt is empty and max_tokens is 0: there is no text")
        if given > longest or (given == longest and count):
            raise Refused(400, f"prompt: {given} tokens are too many, as this model takes up to {longest}: shorten it")
        if given + count > longest:
            raise Refused(
                400,
                f"max_tokens: {count} are too many behind a prompt of {given} tokens, as this model takes up to "
                f"{longest}: use at most {longest - given}",
            )

    def _before(self, task: Task) -> list[int]:
        """Tokens before the first generated token."""
        return list(itertools.takewhile(lambda token: token != FREE, task.tokens))

    async def _whole(
        self,
        request: Request,
        completion: Completion,
        jobs: list[Job],
        texts: list[Detokenizer],
        headed: list[bool],
        head: dict[str, Any],
        form: CompletionForm,
    ) -> Response:
        """The answer with whole texts; ``headed``: whether the prompt of a job begins with BOS."""

        async def disconnected() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        async def result(job: Job, text: Detokenizer, begins: bool) -> Result:
            found = await self._collect(job, text)
            if completion.logprobs is not None:
                scored = await self._scored(job, completion, found, begins)
                before = [] if completion.echo else self._before(job.task)
                logprobs = form.logprobs(self._pieces, scored, before, completion.logprobs)
                found = found._replace(logprobs=logprobs)
            return found._replace(text=self._echo(completion, job) + found.text)

        watcher = asyncio.create_task(disconnected())
        rows = zip(jobs, texts, headed, strict=True)
        parts = [asyncio.create_task(result(*row)) for row in rows]
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
        choices = [form.choice(index, result) for index, result in enumerate(results)]
        usage = self._usage(completion, jobs, sum(result.tokens for result in results))
        self._answers.labels(200).inc()
        self._seconds.observe(time.perf_counter() - jobs[0].submitted)
        return JSONResponse({**head, "choices": choices, "usage": usage})

    async def _scored(self, job: Job, completion: Completion, found: Result, headed: bool) -> list[Scored]:
        """The tokens of a finished text with their log-probabilities, with ``echo`` those of the prompt too."""
        self.scheduler.score(job, completion.logprobs or 0)
        while (event := await job.events.get()).scores is None:
            if event.error:
                raise RuntimeError(event.error)
        before = self._before(job.task)
        last = len(before) + found.tokens
        if job.frontier.stopped:
            last += 1  # EOS
        elif found.reason == "stop":
            offsets = self._pieces.offsets(job.frontier.tokens[len(before) : last], before)
            last = len(before) + sum(offset < len(found.text) for offset in offsets)
        places = range(1 if completion.echo else len(before) + 1, last + 1)
        bos = [Scored(self.model.config.bos_id, None, [])] if completion.echo and headed else []
        return bos + [event.scores[position] for position in places]

    def _usage(self, completion: Completion, jobs: list[Job], count: int) -> dict[str, int]:
        asked = sum(len(self._before(job.task)) for job in jobs[:: completion.n])
        return {"prompt_tokens": asked, "completion_tokens": count, "total_tokens": asked + count}

    async def _collect(self, job: Job, text: Detokenizer) -> Result:
        """The text of a job. Raises ``RuntimeError`` if the job failed."""
        out, count = "", 0
        while True:
            event = await job.events.get()
            if event.error:
                raise RuntimeError(event.error)
            count += len(event.fresh)
            out += text.add(event.fresh, event.done)
            if event.done or text.stopped:
                self.scheduler.cancel([job])
                return Result(out, self._reason(job, text), count)

    def _echo(self, completion: Completion, job: Job) -> str:
        return self.tokenizer.decode(self._before(job.task)) if completion.echo else ""

    def _reason(self, job: Job, text: Detokenizer) -> str:
        return "stop" if text.stopped or job.frontier.stopped else "length"

    async def _events(
        self,
        completion: Completion,
        jobs: list[Job],
        texts: list[Detokenizer],
        head: dict[str, Any],
        form: CompletionForm,
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
            for index, job in enumerate(jobs):
                if begin := form.first(index, self._echo(completion, job)):
                    yield _line({**head, "choices": [begin]})
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
                choice = form.part(index, text, self._reason(jobs[index], texts[index]) if over else None)
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


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
