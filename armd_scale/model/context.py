"""Context parallelism: the rows of a text that a rank holds, and messages between the ranks of a text.

The N rows of a text, in generation order, are 2 C chunks; rank r of C holds chunks r and 2 C - 1 - r, so that all ranks
have as much attention under causal masks. Queries stay on their rank; keys and values of all rows are gathered, and a
row sees a run of the gathered rows, whatever the order. Every rank has the tokens and positions of all rows.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from armd_scale.rows import Rows


class Share(NamedTuple):
    """The part of every text that rank ``rank`` of ``ranks`` holds."""

    rank: int = 0
    ranks: int = 1

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the rank's chunks; one rank has one chunk."""
        return (0,) if self.ranks == 1 else (self.rank, 2 * self.ranks - 1 - self.rank)

    def chunks(self, length: int) -> list[slice]:
        """The rows of the rank's chunks, of ``length`` rows."""
        size = length if self.ranks == 1 else length // (2 * self.ranks)
        return [slice(number * size, (number + 1) * size) for number in self.numbers]

    def part(self, x_BN: Tensor) -> Tensor:
        """The rank's rows of a tensor with all rows in its last dimension."""
        if self.ranks == 1:
            return x_BN
        return torch.cat([x_BN[..., chunk] for chunk in self.chunks(x_BN.shape[-1])], dim=-1)

    def of(self, rows: Rows) -> Rows:
        """The rank's rows. What they see still counts all rows."""
        return rows if self.ranks == 1 else rows.map(self.part)


def share(config: TransformerConfig) -> Share:
    """The share of this rank."""
    ranks = config.context_parallel_size
    return Share(parallel_state.get_context_parallel_rank(), ranks) if ranks > 1 else Share()


def gather(x_n: Tensor, own: Share) -> Tensor:
    """All rows [N, ...] of the rows [n, ...] of every rank; in its backward pass, gradients are summed."""
    return Gather(x_n, own).finish()


class Gather:
    """Starts to gather the rows of all ranks; ``finish`` waits for them.

    Work between both runs beside the messages, in the backward pass as well.
    """

    def __init__(self, x_n: Tensor, own: Share) -> None:
        self._own, self._messages = own, _Messages()
        self._x = x_n if own.ranks == 1 else _Start.apply(x_n, own, self._messages)

    def finish(self) -> Tensor:
        """All rows, [N, ...]."""
        return self._x if self._own.ranks == 1 else _Finish.apply(self._x, self._own, self._messages)


class _Messages:
    """What is on its way: an operation of torch.distributed, which keeps its tensors alive, and what it fills."""

    work: Any
    received: Tensor

    def wait(self) -> None:
        self.work.wait()
        del self.work


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_n: Tensor, own: Share, messages: _Messages) -> Tensor:
        ctx.messages = messages
        group = parallel_state.get_context_parallel_group()
        parts = x_n.new_empty(own.ranks * len(x_n), *x_n.shape[1:])
        messages.work = dist.all_gather_single(parts, x_n.contiguous(), group=group, async_op=True)
        return parts

    @staticmethod
    def backward(ctx: Any, sent: Tensor) -> Any:
        messages = ctx.messages
        messages.wait()
        received = messages.received
        del messages.received
        return received, None, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, own: Share, messages: _Messages) -> Tensor:
        ctx.own, ctx.messages = own, messages
        messages.wait()
        early, late = parts.unflatten(0, (own.ranks, 2, -1)).unbind(1)
        return torch.cat([early, late.flip(0)]).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> Any:
        own, messages = ctx.own, ctx.messages
        early, late = grad_N.unflatten(0, (2, own.ranks, -1)).unbind(0)
        parts = torch.stack([early, late.flip(0)], dim=1).flatten(0, 2)
        messages.received = parts.new_empty(len(parts) // own.ranks, *parts.shape[1:])
        group = parallel_state.get_context_parallel_group()
        messages.work = dist.reduce_scatter_single(messages.received, parts, group=group, async_op=True)
        return parts, None, None
