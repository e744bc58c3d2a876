"""The learning rate, and changes of the schedule."""

import json

import pytest

from armd_scale import config as configs
from armd_scale.errors import UserError
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
    stable = options.model_copy(update={"schedule": "wsd", "decay_steps": 3})
    rates = [schedules.learning_rate(step, stable, 12) for step in range(13)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 7, 0.7, 0.4, 0.1])
    tenth = stable.model_copy(update={"decay_steps": None})
    assert [schedules.learning_rate(step, tenth, 50) for step in (45, 47, 50)] == pytest.approx([1.0, 0.64, 0.1])


def test_a_decay_must_fit_into_the_run():
    with pytest.raises(ValueError, match="= 125 exceed the 120 steps"):
        changed({}, {"optimizer": {"schedule": "wsd", "decay_steps": 120, "warmup_steps": 5}}, 60)


RUN = {
    "train": {"steps": 100},
    "orders": {"ar_steps": 10, "permutation_steps": 50, "rho": 4, "strided_steps": 20},
    "optimizer": {"warmup_steps": 5},
}


def changed(before, after, step):
    """The lines of a resume from ``step`` with ``after`` of a run with ``before``."""

    def config(changes):
        sections = {name: {**RUN.get(name, {}), **changes.get(name, {})} for name in {*RUN, *changes} - {"objective"}}
        return configs.RunConfig.model_validate({**sections, "objective": changes.get("objective", "armd")})

    saved = json.loads(json.dumps(schedules.fields(config(before))))
    return schedules.check(saved, config({**before, **after}), step)


COSINE = {"optimizer": {"schedule": "cosine"}}
WSD = {"optimizer": {"schedule": "wsd", "decay_steps": 20}}


@pytest.mark.parametrize(
    ("before", "after", "step", "jump"),
    [
        ({}, {"train": {"steps": 200}}, 120, "the phase was strided and becomes permutation, 4 tokens shuffled"),
        (COSINE, {"orders": {"strided_steps": 100}}, 120, "the learning rate was 3.01e-05 and becomes"),
        (COSINE, {"train": {"steps": 200}}, 60, "the learning rate was"),
        ({"objective": "ar", **COSINE}, {"train": {"steps": 200}}, 100, "the learning rate was"),
        ({}, {"orders": {"ar_steps": 80, "permutation_steps": 90}}, 60, "becomes left-to-right"),
        (WSD, {"train": {"steps": 200}}, 110, "the learning rate was"),
        (WSD, {"optimizer": {"schedule": "wsd", "decay_steps": 60}}, 100, "the learning rate was"),
        ({}, {"optimizer": {"warmup_steps": 1000}}, 60, "the learning rate was 0.0003 and becomes 1.8e-05"),
    ],
)
def test_a_schedule_that_jumps_is_refused(before, after, step, jump):
    with pytest.raises(UserError, match=f"train.schedule_from={step}$") as error:
        changed(before, after, step)
    assert jump in str(error.value)
    accepted = {**after, "train": {**after.get("train", {}), "schedule_from": step}}
    assert changed(before, accepted, step)
    with pytest.raises(UserError):
        changed(before, accepted, step - 1)


@pytest.mark.parametrize(
    ("before", "after", "step", "lines"),
    [
        ({}, {}, 60, []),
        ({}, {"train": {"steps": 200}}, 60, ["train.steps = 200 (before: 100)"]),
        ({}, {"orders": {"strided_steps": 100}}, 120, ["orders.strided_steps = 100 (before: 20)"]),
        ({"orders": {"strided_steps": 0}}, {"orders": {"strided_steps": 9}}, 100,
         ["orders.strided_steps = 9 (before: 0)"]),
        ({}, {"optimizer": {"lr": 1e-4}}, 60, ["optimizer.lr = 0.0001 (before: 0.0003)"]),
        ({}, {"orders": {"streams": [8]}}, 110, ["orders.streams = [8] (before: [1, 2, 4])"]),
        ({"objective": "mdm"}, {"orders": {"ar_steps": 20}}, 60, []),
        (WSD, {"train": {"steps": 200}}, 60, ["train.steps = 200 (before: 100)"]),
        (WSD, {"train": {"steps": 60}}, 55, ["train.steps = 60 (before: 100)"]),
        (COSINE, {"train": {"steps": 200}}, 0, ["train.steps = 200 (before: 100)"]),
    ],
)  # fmt: skip
def test_changes_of_the_schedule_are_named(before, after, step, lines):
    assert changed(before, after, step) == lines


def test_a_checkpoint_without_a_schedule():
    assert schedules.check({}, configs.RunConfig(), 100) == []
