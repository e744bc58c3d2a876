"""AdamW that also keeps a moving average of the weights.

The average is a third state beside the two moments, so ZeRO shards it, and a checkpoint keeps it, exactly as those.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from armd_scale.config import OptimizerConfig

EMA = "ema"
MOMENTS = ("exp_avg", "exp_avg_sq")


class AveragedAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` with an exponential moving average of the parameters in ``state[param]["ema"]``.

    After step t the average moves by 1 - min(decay, (1 + t) / (10 + t)), the warm-up of SEDD's set-up [D].
    ``ema_decay`` 0 keeps none.
    """

    def __init__(self, params: Iterable[Any], ema_decay: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        if not self.ema_decay:
            return loss
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if EMA not in state:
                    state[EMA] = param.detach().clone()
                    continue
                step = float(state["step"])
                state[EMA].lerp_(param, 1 - min(self.ema_decay, (1 + step) / (10 + step)))
        return loss


def build(module: nn.Module, config: OptimizerConfig, fused: bool) -> AveragedAdamW:
    """The optimiser of a module: weight decay on matrices, none on norms."""
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AveragedAdamW(
        [group for group in groups if group["params"]],
        ema_decay=config.ema,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused,
        foreach=False,  # beside the fused kernel it would only cost memory
    )
