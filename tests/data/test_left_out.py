"""What a run leaves out: merged, checked against what was seen, and kept in checkpoints."""

import json
from pathlib import Path

import pytest

from armd_scale.data.left_out import LeftOut, LostShard
from armd_scale.errors import UserError


def test_ranges_are_merged():
    left_out = LeftOut(8, configured=((4, 6), (20, 30)), rolled_back=((6, 8), (1, 2), (22, 40)))
    assert left_out.steps == ((1, 2), (4, 8), (20, 40))
    assert left_out.samples == [(8, 16), (32, 64), (160, 320)]
    assert [left_out.place(number) for number in (7, 8, 23, 24, 119, 120)] == [7, 16, 31, 64, 159, 320]


def test_a_rollback_counts_steps_of_the_whole_sequence():
    left_out, steps = LeftOut(8).after_rollback(18, 23)
    assert steps == (18, 23)
    left_out, steps = left_out.after_rollback(18, 23)
    assert steps == (23, 28)
    assert left_out.steps == ((18, 28),)
    assert left_out.rolled_back == ((18, 23), (23, 28))


def test_a_rollback_is_remembered_by_checkpoints_and_before_them():
    configured = LeftOut.from_config([[4, 6]], 8)
    rolled_back, _ = configured.after_rollback(18, 23)
    saved = LeftOut.from_state(json.loads(json.dumps(rolled_back.state())), 8)
    assert configured.resumed(24, saved, ()) == rolled_back
    older = LeftOut.from_state(configured.state(), 8)
    assert rolled_back.resumed(16, older, ()) == rolled_back, "the checkpoint is from before the rollback"


@pytest.mark.parametrize(("now", "fine"), [([[4, 6]], False), ([[12, 14]], True), ([], True), ([[8, 9]], True)])
def test_only_steps_ahead_can_be_skipped(now, fine):
    saved = LeftOut.from_state({}, 8)
    if fine:
        assert LeftOut.from_config(now, 8).resumed(8, saved, ()).steps == tuple(map(tuple, now))
    else:
        with pytest.raises(UserError, match=r"data.skip_steps = \[\[4, 6\]\]"):
            LeftOut.from_config(now, 8).resumed(8, saved, ())
    passed = LeftOut.from_state({"skip_steps": [[2, 3]]}, 8)
    with pytest.raises(UserError, match=r"before step 8 .*\[\[2, 3\]\]"):
        LeftOut.from_config(now, 8).resumed(8, passed, ())
    LeftOut.from_config(now, 8).resumed(0, passed, ())  # nothing was seen


def test_a_shard_is_left_out_from_where_it_was_lost():
    saved = LeftOut(8, shards=(LostShard(24, 0, "a.tar"),))
    now = LeftOut.from_config([[1, 3]], 8).resumed(0, LeftOut(8), ())
    now = now.resumed(8, LeftOut(8, configured=((1, 3),), shards=saved.shards), [(0, "a.tar"), (1, "a.tar")])
    assert now.shards == (LostShard(24, 0, "a.tar"), LostShard(80, 1, "a.tar"))
    assert now.describe([Path("x"), Path("y")]) == [
        "the samples of these steps are left out: [[1, 3]]",
        "left out from sample 24 on: x/a.tar",
        "left out from sample 80 on: y/a.tar",
    ]


def test_the_state_of_version_0_1_is_read():
    state = {"skip_steps": [[4, 6], [18, 23]], "own_skips": [[18, 23]], "left_out": [[24, 0, "shard-000001.tar"]]}
    left_out = LeftOut.from_state(state, 8)
    assert left_out.state() == state
    assert LeftOut.from_config([[4, 6]], 8).resumed(30, left_out, ()).state() == state
    assert LeftOut.from_state({}, 8) == LeftOut(8)
