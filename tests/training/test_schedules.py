"""The learning rate."""

import pytest

from armd_scale import config as configs
from armd_scale.training import schedules


def test_learning_rate():
    options = configs.OptimizerConfig(lr=1.0, warmup_steps=4, schedule="cosine", min_lr_ratio=0.1)
    rates = [schedules.learning_rate(step, options, 12) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.1)
    assert rates[8] == pytest.approx(0.55)
    constant = options.model_copy(update={"schedule": "constant"})
    assert schedules.learning_rate(10**6, constant, 12) == 1.0
