"""NLL, divergence from a teacher and their gradients against a dense computation in float64."""

import pytest
import torch
from torch.nn import functional as F

from armd_scale.config import ParallelConfig
from tests.conftest import run_processes

VOCAB, UNUSED = 48, 5


def _inputs():
    draw = torch.Generator().manual_seed(3)
    logits, taught = torch.randn(2, 4, 3, VOCAB, generator=draw) * 3
    for tensor in (logits, taught):
        tensor[..., -UNUSED:] = torch.finfo(torch.float32).min  # padding of the table
    return logits, torch.randint(0, VOCAB - UNUSED, (4, 3), generator=draw), taught, torch.rand(2, 4, 3, generator=draw)


def _expected():
    logits, targets, taught, weights = _inputs()
    used = logits[..., :-UNUSED].double().requires_grad_()
    log_p, log_q = used.log_softmax(-1), taught[..., :-UNUSED].double().log_softmax(-1)
    nll = F.nll_loss(log_p.flatten(0, 1), targets.flatten(), reduction="none").view(4, 3)
    scores = torch.stack([nll, F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)])
    (scores * weights).sum().backward()
    return scores.detach(), F.pad(used.grad, (0, UNUSED))


def _compare(rank, processes, rendezvous, wrong):
    from armd_scale.model import laws
    from armd_scale.parallel import groups

    torch.set_num_threads(1)
    parallel = ParallelConfig(tensor=processes)
    groups.start(parallel, rank=rank, processes=processes, rendezvous=rendezvous, device=torch.device("cpu"))
    logits, targets, taught, weights = _inputs()
    part = slice(rank * VOCAB // processes, (rank + 1) * VOCAB // processes)
    mine = logits[..., part].clone().requires_grad_()
    taught = taught.roll(1, 0) if wrong else taught
    scores = laws.scores(mine, targets, taught[..., part])
    (scores * weights).sum().backward()
    expected, gradient = _expected()
    close = torch.allclose(scores.double(), expected, atol=1e-5)
    close &= torch.allclose(mine.grad.double(), gradient[..., part], atol=1e-6)
    groups.stop()
    assert close != wrong


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("wrong", [False, True])
def test_scores_and_gradients_are_those_of_a_dense_vocabulary(processes, wrong):
    """``wrong``: the teacher's rows are one place off."""
    run_processes(processes, _compare, wrong)
