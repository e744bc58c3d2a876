"""Documents of which a part counts in the loss: conversations, and texts behind a prompt.

Such a document is a list of segments in turn: text that does not count, text that counts, and so on. Segments are
encoded one by one, as a model encodes a prompt and then writes the answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from armd_scale.data.chat import ChatTemplate
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.errors import UserError

ANSWERING = "assistant"
"""Role of the messages that count."""


def segments(messages: Sequence[Mapping[str, Any]], template: ChatTemplate) -> list[str]:
    """Segments of a conversation: an answer begins behind what the template asks for it with, and includes its end.

    Raises ``UserError`` where the template does not take the messages, or writes the beginning of a conversation
    otherwise than the beginning of the whole one.
    """
    whole, found, at = template.render(messages, add_generation_prompt=False), [], 0
    for number, message in enumerate(messages):
        if message.get("role") != ANSWERING:
            continue
        asked = template.render(messages[:number]) if number else ""
        answered = template.render(messages[: number + 1], add_generation_prompt=False)
        if not (answered.startswith(asked) and whole.startswith(answered)):
            raise UserError(f"messages: the chat template writes message {number + 1} otherwise when others follow")
        found += [whole[at : len(asked)], whole[len(asked) : len(answered)]]
        at = len(answered)
    if not found:
        raise UserError(f"messages: no message has the role '{ANSWERING}'")
    return [*found, whole[at:]] if at < len(whole) else found


def encode(tokenizer: Tokenizer, parts: Sequence[str], special: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of segments, and whether each counts; without a BOS before them and an EOS behind, which the data has.

    ``special``: the strings of special tokens are these tokens, as chat templates write them.
    """
    encoded = [tokenizer.encode_with_special(part) if special else tokenizer.encode(part) for part in parts]
    tokens = np.array([token for part in encoded for token in part], dtype=np.int64)
    counted = np.repeat(np.arange(len(parts)) % 2 == 1, [len(part) for part in encoded])
    first = int(special and len(tokens) > 0 and tokens[0] == tokenizer.bos_id)
    last = len(tokens) - int(special and len(tokens) > first and tokens[-1] == tokenizer.eos_id)
    return tokens[first:last], counted[first:last]
