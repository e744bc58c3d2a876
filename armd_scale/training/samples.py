"""The samples of a run.

The samples of a step follow from the number of the step and from what is left out (``data.left_out``). A checkpoint
keeps what is left out, so a resumed run reads the same samples as an uninterrupted run.
"""

import json
from typing import Any

import numpy as np

from armd_scale.config import RunConfig
from armd_scale.data import shards
from armd_scale.data.left_out import LeftOut, Range
from armd_scale.data.shards import LOSS
from armd_scale.data.stream import Mixture, open_mixture
from armd_scale.errors import UserError
from armd_scale.files import write_atomically
from armd_scale.logs import DATA as log


def check(config: RunConfig) -> None:
    """Check the shards of a run, and record which shards are left out; ``UserError`` names a damaged shard.

    Sizes are always checked, hashes with ``data.verify``; held-out shards are never left out.
    """
    shards.verify(config.data_directory / "heldout", hashes=config.data.verify)
    lost = {}
    for data in open_mixture(config):
        damaged = shards.damaged(data.folder, hashes=config.data.verify)
        damaged.pop("tail.tar", None)  # not used for training
        if damaged and config.data.damaged_shards == "stop":
            raise UserError(f"{next(iter(damaged.values()))}, or set data.damaged_shards=leave_out")
        for line in damaged.values():
            log.warning("left out: %s", line)
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
    """Reads the samples of a run by number: step x ``train.global_batch`` + index in the batch."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.datasets = open_mixture(config)
        self._tokenizer: str = self.datasets[0].index["tokenizer_sha256"]
        self._leave_out(LeftOut.from_config(config.data.skip_steps, config.train.global_batch))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token, EOS included, on average."""
        return self._mixture.bytes_per_token

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [count, N], int64, of the samples start..start + count - 1."""
        return self._mixture.read(start, count)

    def starts(self, start: int, count: int) -> np.ndarray | None:
        """``packing.starts`` [count, N] of these samples; None if documents are joined."""
        return self._mixture.starts(start, count) if self._config.data.documents == "separate" else None

    def counted(self, start: int, count: int) -> np.ndarray | None:
        """Whether tokens [count, N] of these samples count in the loss; None if all do."""
        return self._mixture.flags(start, count, LOSS) if self.counted_share < 1 else None

    @property
    def counted_share(self) -> float:
        """Share of the tokens that count in the loss."""
        shares = [data.index["counted"] / data.index["tokens"] if data.has(LOSS) else 1.0 for data in self.datasets]
        return float(self._mixture.shares @ shares)

    def ids(self, start: int, count: int) -> list[list[int]]:
        """(data set, number in the data set) of the samples start..start + count - 1."""
        return np.stack(self._mixture.locate(start, count), axis=1).tolist()

    def skip(self, first: int, last: int) -> Range:
        """Leave out the samples of the steps [first, last) after a rollback; returns the range of data steps."""
        left_out, skipped = self.left_out.after_rollback(first, last)
        self._leave_out(left_out)
        return skipped

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"tokenizer_sha256": self._tokenizer, **self.left_out.state()}

    def start(self, step: int, state: dict[str, Any]) -> list[str]:
        """Start or resume at a step, from the ``state`` of a checkpoint ({} at the beginning); returns log lines.

        ``UserError`` if earlier steps would now have other samples.
        """
        if state.get("tokenizer_sha256", self._tokenizer) != self._tokenizer:
            raise UserError(
                f"the data in {self.datasets[0].folder} was made with another tokenizer than the checkpoint: "
                "restore the data, or choose another run_dir"
            )
        saved = LeftOut.from_state(state, self._config.train.global_batch)
        self._leave_out(self.left_out.resumed(step, saved, self._damaged_shards()))
        return self.left_out.describe([data.folder for data in self.datasets])

    def _leave_out(self, left_out: LeftOut) -> None:
        self.left_out = left_out
        data = self._config.data
        weights = [data.weight, *(other.weight for other in data.mixture)]
        self._mixture = Mixture(self.datasets, weights, self._config.seed, left_out.samples, left_out.shards)

    def _damaged_shards(self) -> list[tuple[int, str]]:
        """(data set, file name) of the shards that ``check`` has recorded as damaged."""
        names = self._config.run_directory.damaged_shards()
        return [(number, name) for number, data in enumerate(self.datasets) for name in names.get(str(data.folder), [])]
