"""Input of the network: the rows of a batch in generation order.

- context rows 0..N-1: BOS and all tokens of the order but the last, the input of the X stream;
- target rows 1..N: the tokens to predict, the rows of the G stream;
- positions in the text of both kinds of rows, and the number of rows that a row sees.

``arrange`` makes rows for generation orders, ``corrupt`` for masked diffusion, whose context rows are the masked text.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from armd_scale.orders import Layout


class Visible(NamedTuple):
    """Length of the prefix that a row sees, as tensors [B, N]; B(i) is the block of row i (masks M^c and M^sc)."""

    context_of_context: Tensor
    """X over X: context rows i with B(i) <= B(n)."""
    context_of_target: Tensor
    """G over X: context rows i with B(i) < B(n)."""
    target_of_target: Tensor
    """G over G, in the causal layers: target rows i with B(i) <= B(n)."""


class Drafts(NamedTuple):
    """Further target rows: row n knows as much as target row n and predicts a later token of the order. All [B, N].

    They are the rows with which exact parallel decoding proposes tokens. No row sees them.
    """

    tokens: Tensor
    positions: Tensor
    lags: Tensor
    """How many places later their tokens are; 1: the token after that of the target row."""
    weights: Tensor
    """Factors of their NLL, float32; 0 where the order has no such token."""


class Rows(NamedTuple):
    """A micro-batch in generation order; all tensors [B, N] of int64."""

    context_tokens: Tensor
    context_positions: Tensor
    target_tokens: Tensor
    target_positions: Tensor
    visible: Visible | None
    """None with one token per block: all masks are then the ordinary causal mask."""
    weights: Tensor | None = None
    """Factors of the NLL of the targets, [B, N] float32; None: all 1."""
    drafts: Drafts | None = None
    in_text_order: bool = False
    """Whether rows are known to go left to right, so that each sees nothing but tokens before its target."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """The rows with ``change`` applied to every tensor."""
        visible = self.visible and Visible(*map(change, self.visible))
        tokens = {name: change(getattr(self, name)) for name in self._fields[:4]}
        weights = None if self.weights is None else change(self.weights)
        drafts = self.drafts and Drafts(*map(change, self.drafts))
        return self._replace(**tokens, visible=visible, weights=weights, drafts=drafts)

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def fill(self, batch: int) -> "Rows":
        """The rows repeated cyclically to ``batch`` texts."""
        index = torch.arange(batch) % len(self.target_tokens)
        return self.map(lambda tensor: tensor[index])


def arrange(tokens_BN: np.ndarray, layout: Layout, bos_id: int) -> Rows:
    """Gather tokens [B, N] (text order, no BOS) by a layout [B, N] or [N] shared by the batch."""
    order = np.broadcast_to(layout.order, tokens_BN.shape)
    blocks = np.broadcast_to(layout.block_ids, tokens_BN.shape)
    targets = np.take_along_axis(tokens_BN, order - 1, axis=-1)
    first = np.zeros_like(order[:, :1])
    visible = None
    if (np.diff(blocks, axis=-1) == 0).any():
        context_blocks = _tensor(np.concatenate([first, blocks[:, :-1]], axis=-1))
        target_blocks = _tensor(blocks)
        visible = Visible(
            torch.searchsorted(context_blocks, context_blocks, right=True),
            torch.searchsorted(context_blocks, target_blocks, right=False),
            torch.searchsorted(target_blocks, target_blocks, right=True),
        )
    return Rows(
        context_tokens=_tensor(np.concatenate([first + bos_id, targets[:, :-1]], axis=-1)),
        context_positions=_tensor(np.concatenate([first, order[:, :-1]], axis=-1)),
        target_tokens=_tensor(targets),
        target_positions=_tensor(order),
        visible=visible,
    )


def look_ahead(rows: Rows, lags_BN: np.ndarray) -> Rows:
    """Rows of one token a block with drafts: draft row n predicts the target of row n + lag."""
    assert rows.visible is None
    length = lags_BN.shape[1]
    index_BN = np.arange(length) + lags_BN
    place_BN = torch.from_numpy(np.minimum(index_BN, length - 1))
    weights = torch.from_numpy((index_BN < length).astype(np.float32))
    tokens, positions = (tensor.gather(1, place_BN) for tensor in (rows.target_tokens, rows.target_positions))
    drafts = Drafts(tokens, positions, _tensor(lags_BN), weights)
    return rows._replace(drafts=drafts)


def corrupt(tokens_BN: np.ndarray, masked_BN: np.ndarray, weight_B: np.ndarray, mask_id: int) -> Rows:
    """Rows of masked diffusion: masked tokens are predicted from the unmasked tokens.

    The NLL of a masked token has the weight ``weight_B``, the NLL of an unmasked token the weight 0.
    """
    positions = np.broadcast_to(np.arange(1, tokens_BN.shape[1] + 1), tokens_BN.shape)
    return Rows(
        context_tokens=_tensor(np.where(masked_BN, mask_id, tokens_BN)),
        context_positions=_tensor(positions),
        target_tokens=_tensor(tokens_BN),
        target_positions=_tensor(positions),
        visible=None,
        weights=torch.from_numpy((masked_BN * weight_B[:, None]).astype(np.float32)),
    )


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64, order="C"))
