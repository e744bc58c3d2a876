"""The bodies of requests, and what is wrong with a body in one line.

``Completion`` is OpenAI's completion, ``Chat`` OpenAI's chat completion; both have the fields of ``Decoding`` too. The
description of a field says which values it takes.
"""

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

BODY = 1 << 20
"""Largest size of a request in bytes."""
_STOPS = 16
_SHOWN = 60  # characters of a wrong value in a message

_Token = Annotated[int, Field(ge=-(2**31), lt=2**31)]
_COUNT = "a whole number of at least 0"
_Setting = Annotated[int, Field(ge=-(2**31), le=2**31, description="a whole number")]
_Number = Annotated[float, Field(description="a number")]
_Switch = Annotated[bool, Field(description="true or false")]
_Penalty = Annotated[float | None, Field(ge=0, le=0, description="0, as this server has no penalties")]


class Refused(Exception):
    """A request that is answered with an error of one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class _Request(BaseModel):
    """The fields that all kinds of completions have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="the name of the model, a string")
    n: int = Field(1, ge=1, le=128, description="a whole number from 1 to 128")
    temperature: _Number = 1.0
    top_p: _Number = 1.0
    top_k: _Setting = 0
    min_p: _Number = 0.0
    streams: _Setting = 1
    draft: _Setting = 0
    steps: _Setting = 0
    block: _Setting = 0
    confidence: _Number = 0.9
    stop: str | list[str] | None = Field(None, description="a string or a list of strings")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="a whole number of 64 bits")
    stream: _Switch = False
    stream_options: StreamOptions | None = Field(None, description='an object, such as {"include_usage": true}')
    user: str | None = Field(None, description="a string")
    # OpenAI fields without an effect here; any value but the default is refused.
    logit_bias: dict[str, Any] | None = Field(None, max_length=0, description="empty, as this server has no biases")
    presence_penalty: _Penalty = 0
    frequency_penalty: _Penalty = 0

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

    def check(self) -> Self:
        """Refuse values that the fields alone do not show to be wrong."""
        if len(self.stops) > _STOPS or not all(0 < len(stop) <= 256 for stop in self.stops):
            raise Refused(400, f"stop: must be up to {_STOPS} strings of 1 to 256 characters")
        return self


class Completion(_Request):
    """The body of a completion request."""

    prompt: str | list[str] | list[_Token] | list[list[_Token]] = Field(
        "", description="a text, a list of texts, a list of tokens, or a list of lists of tokens"
    )
    suffix: str | None = Field(None, description="a text")
    max_tokens: int = Field(16, ge=0, le=2**31, description=_COUNT)
    echo: _Switch = False
    order: _Switch = False
    logprobs: int | None = Field(None, ge=0, le=20, description="a whole number from 0 to 20")
    best_of: Literal[1] | None = Field(None, description="1, as this server does not rank texts")

    def check(self) -> Self:
        if self.order and not self.stream:
            raise Refused(400, "order: needs stream=true")
        if self.logprobs is not None and self.stream:
            raise Refused(400, "logprobs: not available with stream=true: leave out one of them")
        return super().check()


class Message(BaseModel):
    """A message of a chat; other fields are passed to the template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = ""

    def plain(self) -> dict[str, Any]:
        """The message with its content as one text. Raises ``Refused`` for content that is no text."""
        content = self.content or ""
        if not isinstance(content, str):
            parts = [part.get("text") for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise Refused(400, 'messages: content must be text or a list of {"type": "text", "text": ...}')
            content = "".join(map(str, parts))
        return {**self.model_dump(), "content": content}


class Chat(_Request):
    """The body of a chat completion request."""

    messages: list[Message] = Field(
        min_length=1, description='a list of messages, such as [{"role": "user", "content": "..."}]'
    )
    max_tokens: int | None = Field(None, ge=0, le=2**31, description=_COUNT)
    max_completion_tokens: int | None = Field(None, ge=0, le=2**31, description=_COUNT)
    logprobs: _Switch = False
    top_logprobs: int = Field(0, ge=0, le=20, description="a whole number from 0 to 20")
    response_format: dict[Literal["type"], Literal["text"]] | None = Field(None, description='{"type": "text"}')
    tools: list[Any] = Field([], max_length=0, description="empty, as this server has no tools")

    def check(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise Refused(400, "top_logprobs: needs logprobs=true")
        return super().check()

    def completion(self, prompt: list[int], room: int) -> Completion:
        """The completion of the rendered messages; ``room``: tokens behind the prompt, the default of max_tokens."""
        shared = {name: getattr(self, name) for name in _Request.model_fields}
        counts = (count for count in (self.max_completion_tokens, self.max_tokens) if count is not None)
        return Completion(
            **shared,
            prompt=prompt,
            max_tokens=next(counts, max(1, room)),
            logprobs=self.top_logprobs if self.logprobs else None,
        ).check()


_Body = TypeVar("_Body", Completion, Chat)


def parse(kind: type[_Body], body: bytes) -> _Body:
    """Read a body. Raises ``Refused`` with one line that names the first wrong field and the values it takes."""
    try:
        return kind.model_validate_json(body).check()
    except ValidationError as error:
        raise Refused(400, _explain(kind, error.errors()[0])) from error


def _explain(kind: type[BaseModel], error: Any) -> str:
    """What is wrong with a body."""
    if error["type"] == "json_invalid":
        return f"the request is not valid JSON: {error['msg'].partition(': ')[2].lower()}"
    names = [part for part in error["loc"] if isinstance(part, str)]
    if not names:
        return "the request must be a JSON object"
    name = names[0]
    if error["type"] == "extra_forbidden":
        where = ".".join(repr(part)[1:-1][:_SHOWN] for part in names)
        known = f"; fields: {', '.join(kind.model_fields)}" if len(names) == 1 else ""
        return f"{where}: unknown field{known}"
    expected = kind.model_fields[name].description
    if error["type"] == "missing" and len(names) == 1:
        return f"{name}: missing; it must be {expected}"
    try:
        value = json.dumps(error["input"], default=str)
    except ValueError:  # a number of thousands of digits
        value = "this number"
    return f"{name}: must be {expected}; it is {value if len(value) <= _SHOWN else value[:_SHOWN] + '...'}"
