"""Compares laws of tokens over a vocabulary that the tensor-parallel ranks share.

- ``scores``: NLL, and the divergence from a teacher's law;
- ``overlap``: the probability that a token drawn from one law is accepted under the other.

The gradient of logits z with p = softmax(z), for a target t and the teacher's law q: of the NLL p - onehot(t), of
KL(q || p) p - q. Both need sums over the whole vocabulary in the forward pass alone.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def scores(logits_NBV: Tensor, targets_NB: Tensor, taught_NBV: Tensor) -> Tensor:
    """-log p of the targets and KL(teacher || p) in nats: [2, N, B] float32.

    ``logits_NBV``, ``taught_NBV``: this rank's part of the vocabulary, float32; ``taught_NBV`` gets no gradient.
    """
    return _Scores.apply(logits_NBV, targets_NB, taught_NBV)


def overlap(logits_NBV: Tensor, other_NBV: Tensor) -> Tensor:
    """sum_v min(p(v), q(v)) of the laws of two sets of logits, [N, B] float32: 1 - total variation, without gradients.

    Speculative sampling (arXiv 2302.01318) accepts a token drawn from one law under the other with this probability.
    """
    shared = torch.minimum(_log_softmax(logits_NBV), _log_softmax(other_NBV)).exp().sum(-1)
    _reduce(shared, dist.ReduceOp.SUM)
    return shared


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NBV: Tensor, targets_NB: Tensor, taught_NBV: Tensor) -> Tensor:
        log_p, log_q = _log_softmax(logits_NBV), _log_softmax(taught_NBV)
        p, q = log_p.exp(), log_q.exp()
        size = logits_NBV.shape[-1]
        local = targets_NB - size * parallel_state.get_tensor_model_parallel_rank()
        here = (local >= 0) & (local < size)
        local = local.clamp(0, size - 1)[..., None]
        nll = -log_p.gather(-1, local)[..., 0] * here
        results = torch.stack([nll, (q * (log_q - log_p)).sum(-1)])
        _reduce(results, dist.ReduceOp.SUM)
        ctx.save_for_backward(p, q, local, here)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        p, q, local, here = ctx.saved_tensors
        of_nll, of_divergence = gradients[0]
        gradient = p * (of_nll + of_divergence)[..., None] - q * of_divergence[..., None]
        return gradient.scatter_add_(-1, local, -(of_nll * here)[..., None]), None, None


def _log_softmax(logits_NBV: Tensor) -> Tensor:
    highest = logits_NBV.amax(-1, keepdim=True)
    _reduce(highest, dist.ReduceOp.MAX)
    total = (logits_NBV - highest).exp().sum(-1, keepdim=True)
    _reduce(total, dist.ReduceOp.SUM)
    return logits_NBV - (highest + total.log())


def _reduce(tensor: Tensor, how: Any) -> None:
    """All-reduce in place over the tensor-parallel ranks."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(tensor, how, group=parallel_state.get_tensor_model_parallel_group())
