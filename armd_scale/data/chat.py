"""Chat templates: messages -> the text that a model continues, as transformers renders it."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.errors import UserError


class ChatTemplate:
    """The chat template of a tokenizer. ``render`` raises ``UserError`` for messages that it does not take."""

    def __init__(self, source: str, where: Path, tokenizer: Tokenizer) -> None:
        self.source = source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        environment.globals |= {"bos_token": tokenizer.token(tokenizer.bos_id), "tools": None, "documents": None}
        environment.globals |= {"eos_token": tokenizer.token(tokenizer.eos_id)}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template in {where} cannot be read: {error}; fix it or remove it") from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of messages with ``role`` and ``content``; ``add_generation_prompt``: and the head of an answer."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise UserError(f"messages: the chat template does not take them: {error}") from error


def load(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template in ``chat_template.jinja`` or ``tokenizer_config.json`` beside a tokenizer; None without one."""
    file = tokenizer.path.with_name(tokenizers.CHAT_TEMPLATE)
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), file, tokenizer)
    source = tokenizers.read_settings(tokenizer.path.parent).get("chat_template")
    if isinstance(source, list):  # several templates by name
        source = {each.get("name"): each.get("template") for each in source}.get("default")
    return ChatTemplate(source, tokenizer.path.parent, tokenizer) if isinstance(source, str) else None


class _Generation(jinja2.ext.Extension):
    """The block ``generation``, which marks what an assistant writes; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012  (the library's name and type)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
