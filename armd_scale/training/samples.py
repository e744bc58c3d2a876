"""The samples of a run, and what is left out of them: ranges of steps, and shards that are lost.

Which sample a step sees follows from the step and from what is left out. A checkpoint keeps the latter, so that a run
that goes on sees what it would have seen, and nothing that it has seen already.
"""

import json
from typing import Any

import numpy as np

from armd_scale.config import RunConfig
from armd_scale.data import shards
from armd_scale.data.stream import Mixture, open_mixture, skipping
from armd_scale.errors import UserError
from armd_scale.files import write_atomically


def check(config: RunConfig) -> None:
    """Check the shards of a run, and write down which of them are left out of it; ``UserError`` names a damaged one.

    Sizes are always checked, hashes with ``data.verify``; held-out shards are never left out.
    """
    shards.verify(config.data_directory / "heldout", hashes=config.data.verify)
    lost = {}
    for data in open_mixture(config):
        damaged = shards.damaged(data.folder, hashes=config.data.verify)
        damaged.pop("tail.tar", None)  # is not trained on
        if damaged and config.data.damaged_shards == "stop":
            raise UserError(f"{next(iter(damaged.values()))}, or set data.damaged_shards=leave_out")
        for line in damaged.values():
            print(f"data: left out: {line}", flush=True)
        if damaged:
            lost[str(data.folder)] = sorted(damaged)
        if len(damaged) >= len(data.index["shards"]):
            raise UserError(f"every shard in {data.folder} is damaged or missing: prepare it again")
    path = config.run_directory.left_out_path
    if lost:
        config.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(lost, indent=1) + "\n")
    else:
        path.unlink(missing_ok=True)


class Samples:
    """Reads the samples of a run by their numbers, step x ``train.global_batch`` + place in the batch."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.datasets = open_mixture(config)
        self._tokenizer: str = self.datasets[0].index["tokenizer_sha256"]
        self._skip: list[list[int]] = config.data.skip_steps
        self.own_skips: list[list[int]] = []  # ranges that the run has left out by itself
        self._left_out: list[list[Any]] = []
        self._open()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token, EOS included, on average."""
        return self._mixture.bytes_per_token

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens of the sample numbers start..start + count - 1, [count, N] int64."""
        return self._mixture.read(start, count)

    def ids(self, start: int, count: int) -> list[list[int]]:
        """Number of the data set and number in it of the same samples."""
        return np.stack(self._mixture.locate(start, count), axis=1).tolist()

    def skip(self, first: int, last: int) -> list[int]:
        """Leave out what the steps [first, last) would have seen; the range in steps of the whole sequence."""
        batch = self._config.train.global_batch
        edges = skipping(np.array([first, last - 1]) * batch, self._ranges(self._skip)) // batch
        found = [int(edges[0]), int(edges[1]) + 1]
        self.own_skips = [*self.own_skips, found]
        self._skip = _joined([*self._skip, found])
        self._open()
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "tokenizer_sha256": self._tokenizer,
            "skip_steps": self._skip,
            "own_skips": self.own_skips,
            "left_out": self._left_out,
        }

    def start(self, step: int, state: dict[str, Any]) -> list[str]:
        """Go on at a step, from the ``state`` of a checkpoint ({} at the beginning); lines that say what is left out.

        ``UserError`` when the samples of the steps before would now be others.
        """
        if state.get("tokenizer_sha256", self._tokenizer) != self._tokenizer:
            raise UserError(
                f"the data in {self.datasets[0].folder} was made with another tokenizer than what the run has seen: "
                "restore it, or start anew in another run_dir"
            )
        # What the run itself has left out stays so.
        own = state.get("own_skips", [])
        self.own_skips = own
        self._skip = _joined([*self._config.data.skip_steps, *own])
        self._check_skips(step, state.get("skip_steps", []))
        first = int(skipping(np.array([step * self._config.train.global_batch]), self._ranges(self._skip))[0])
        before = [list(each) for each in state.get("left_out", [])]
        known = {(number, name) for _, number, name in before}
        new = [[first, *each] for each in self._lost_now() if tuple(each) not in known]
        self._left_out = before + new
        self._open()
        lines = [f"the samples of these steps are left out: {self._skip}"] if self._skip else []
        for since, number, name in self._left_out:
            lines.append(f"left out from sample {since} on: {self.datasets[number].folder / name}")
        return lines

    def _open(self) -> None:
        data = self._config.data
        weights = [data.weight, *(other.weight for other in data.mixture)]
        left_out = [(since, number, name) for since, number, name in self._left_out]
        self._mixture = Mixture(self.datasets, weights, self._config.seed, self._ranges(self._skip), left_out)

    def _ranges(self, steps: list[list[int]]) -> list[tuple[int, int]]:
        batch = self._config.train.global_batch
        return [(first * batch, last * batch) for first, last in steps]

    def _lost_now(self) -> list[tuple[int, str]]:
        lost = self._config.run_directory.damaged_shards()
        return [(number, name) for number, data in enumerate(self.datasets) for name in lost.get(str(data.folder), [])]

    def _check_skips(self, step: int, before: list[list[int]]) -> None:
        if not step:
            return
        seen = np.array([step * self._config.train.global_batch - 1])
        both = [self._ranges(before), self._ranges(self._skip)]
        reached = max(int(skipping(seen, ranges)[0]) for ranges in both)
        past = [[pair for pair in ranges if pair[0] <= reached] for ranges in both]
        if past[0] != past[1]:
            raise UserError(
                f"data.skip_steps = {self._skip} changes what the run has seen before step {step} (it was {before}): "
                "only steps ahead can be skipped; to go back, remove newer checkpoints"
            )


def _joined(ranges: list[list[int]]) -> list[list[int]]:
    """Growing ranges that do not touch, of the same steps."""
    out: list[list[int]] = []
    for first, last in sorted(ranges):
        if out and out[-1][1] >= first:
            out[-1][1] = max(last, out[-1][1])
        else:
            out.append([first, last])
    return out
