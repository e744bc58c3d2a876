"""Data that a run leaves out: steps that the configuration skips, steps of rollbacks, and damaged shards.

Steps and samples are numbered as in a run that leaves nothing out (the *whole* sequence). If earlier samples are left
out, sample n of the run is a later sample of the whole sequence.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from armd_scale.data.stream import skipping
from armd_scale.errors import UserError

Range = tuple[int, int]
"""[first, last)."""


class LostShard(NamedTuple):
    """A damaged shard."""

    since: int
    """First sample of the whole sequence without the shard."""
    dataset: int
    """Number of the data set."""
    name: str
    """File name of the shard."""


@dataclass(frozen=True)
class LeftOut:
    """The data that a run leaves out, the same on all ranks. Checkpoints keep ``state``."""

    batch: int
    """Number of samples of a step."""
    configured: tuple[Range, ...] = ()
    """Ranges of steps of ``data.skip_steps``."""
    rolled_back: tuple[Range, ...] = ()
    """Ranges of steps whose samples rollbacks left out."""
    shards: tuple[LostShard, ...] = ()
    """Damaged shards."""

    @property
    def steps(self) -> tuple[Range, ...]:
        """All ranges of steps in increasing order, merged where they touch."""
        merged: list[Range] = []
        for first, last in sorted(self.configured + self.rolled_back):
            if merged and merged[-1][1] >= first:
                merged[-1] = merged[-1][0], max(last, merged[-1][1])
            else:
                merged.append((first, last))
        return tuple(merged)

    @property
    def samples(self) -> list[Range]:
        """The ranges of ``steps`` in samples of the whole sequence."""
        return [(first * self.batch, last * self.batch) for first, last in self.steps]

    def place(self, sample: int) -> int:
        """The sample of the whole sequence that is sample ``sample`` of the run."""
        return int(skipping(np.array([sample]), self.samples)[0])

    def after_rollback(self, first: int, last: int) -> "tuple[LeftOut, Range]":
        """Also leave out the samples of the steps [first, last) of the run.

        Returns the new object and the range of these steps in the whole sequence.
        """
        begin = self.place(first * self.batch) // self.batch
        end = self.place((last - 1) * self.batch) // self.batch + 1
        return replace(self, rolled_back=(*self.rolled_back, (begin, end))), (begin, end)

    def resumed(self, step: int, saved: "LeftOut", damaged: Iterable[tuple[int, str]]) -> "LeftOut":
        """The data left out from ``step`` on, given ``saved`` from the checkpoint of that step.

        ``damaged``: (data set, name) of the shards that are damaged now. Raises ``UserError`` if the configuration
        changes samples that the run has already seen.
        """
        # Rollbacks of this process may be newer than the checkpoint.
        now = replace(self, rolled_back=self.rolled_back or saved.rolled_back)
        now._check_seen(step, saved)
        since = now.place(step * self.batch)
        known = {(shard.dataset, shard.name) for shard in saved.shards}
        new = (LostShard(since, *shard) for shard in damaged if shard not in known)
        return replace(now, shards=(*saved.shards, *new))

    def _check_seen(self, step: int, saved: "LeftOut") -> None:
        if not step:
            return
        reached = max(left_out.place(step * self.batch - 1) for left_out in (self, saved))
        now, before = ([pair for pair in left_out.samples if pair[0] <= reached] for left_out in (self, saved))
        if now != before:
            raise UserError(
                f"data.skip_steps = {_lists(self.steps)} changes steps before step {step} "
                f"(the checkpoint has {_lists(saved.steps)}): skip later steps only, or remove the newer checkpoints"
            )

    def describe(self, folders: Sequence[Path]) -> list[str]:
        """Lines for the log; ``folders``: directories of the data sets."""
        lines = [f"the samples of these steps are left out: {_lists(self.steps)}"] if self.steps else []
        for shard in self.shards:
            lines.append(f"left out from sample {shard.since} on: {folders[shard.dataset] / shard.name}")
        return lines

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, under the names of version 0.1: ``skip_steps`` includes the ranges of rollbacks."""
        return {
            "skip_steps": _lists(self.steps),
            "own_skips": _lists(self.rolled_back),
            "left_out": _lists(self.shards),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], batch: int) -> "LeftOut":
        """Read the ``state`` of a checkpoint; {} leaves nothing out."""
        return cls(
            batch,
            configured=_pairs(state.get("skip_steps", [])),
            rolled_back=_pairs(state.get("own_skips", [])),
            shards=tuple(LostShard(*shard) for shard in state.get("left_out", [])),
        )

    @classmethod
    def from_config(cls, skip_steps: Sequence[Sequence[int]], batch: int) -> "LeftOut":
        """Read ``data.skip_steps`` of the configuration."""
        return cls(batch, configured=_pairs(skip_steps))


def _pairs(ranges: Sequence[Sequence[int]]) -> tuple[Range, ...]:
    return tuple((first, last) for first, last in ranges)


def _lists(rows: Iterable[Iterable[Any]]) -> list[list[Any]]:
    return [list(row) for row in rows]
