"""AdamW with a moving average of the weights, and with steps that the device can skip.

The average is a third state beside the moments, so ZeRO shards it and checkpoints hold it like the moments.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from armd_scale.config import OptimizerConfig
from armd_scale.parallel.sharding import is_frozen

MASTER = "weight"
"""Name of the float32 master weights among the states of a checkpoint."""
EMA = "ema"
MOMENTS = ("exp_avg", "exp_avg_sq")


class AveragedAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` with an exponential moving average of the parameters in ``state[param]["ema"]``.

    After update t the average moves by 1 - min(decay, (1 + t) / (10 + t)), the warm-up of SEDD (arXiv 2310.16834). The
    average starts as the weights after the first update. ``ema_decay`` 0: no average.
    """

    def __init__(self, params: Iterable[Any], ema_decay: float, **options: Any) -> None:
        super().__init__(params, fused=True, **options)
        self.ema_decay = ema_decay
        # The fused kernels of PyTorch's AdamW read these attributes on the device, so the host need not know whether a
        # step is applied.
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None

    def guard(self, accepted: Tensor, divisor: Tensor | None) -> None:
        """Make the next steps do nothing if ``accepted`` is False, and divide gradients by ``divisor``."""
        self.found_inf = (~accepted).float()
        self.grad_scale = divisor

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
                updates = state["step"]
                weight = 1 - ((1 + updates) / (10 + updates)).clamp(max=self.ema_decay)
                weight = torch.where(updates > 1, weight, 1.0)
                state[EMA].lerp_(param, weight if self.found_inf is None else weight * (1 - self.found_inf))
        return loss


def build(module: nn.Module, config: OptimizerConfig) -> AveragedAdamW:
    """The optimiser of a module: weight decay on matrices, none on norms and on frozen parameters."""
    decayed = [p for p in module.parameters() if p.dim() >= 2 and not is_frozen(p)]
    others = [p for p in module.parameters() if p.dim() < 2 or is_frozen(p)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AveragedAdamW(
        [group for group in groups if group["params"]],
        ema_decay=config.ema,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
