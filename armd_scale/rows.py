"""Input of the network: the rows of a batch in generation order.

- context rows 0..N-1: BOS and all tokens of the order but the last, the input of the X stream;
- target rows 1..N: the tokens to predict, the rows of the G stream;
- positions in the text of both kinds of rows, and the rows that a row sees.

Separate documents of a packed sample follow each other, each with a BOS, positions and an order of its own: a document
of n tokens has n context rows and n target rows, and its rows see no row before its first one.

``arrange`` makes rows for generation orders, ``corrupt`` for masked diffusion, whose context rows are the masked text.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from armd_scale import packing
from armd_scale.orders import Layout


class Visible(NamedTuple):
    """End of the rows that a row sees, as tensors [B, N]; B(i) is the block of row i (masks M^c and M^sc)."""

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
    starts: Tensor | None = None
    """First row of the document of every row, before which it sees nothing; None: each sample is one document."""
    counted: Tensor | None = None
    """Whether a target counts, [B, N]; None: all do. The weights of the others are 0."""
    reach: int = 0
    """At most so many of the context rows up to its own are not seen by a target; above 0 where blocks have several
    tokens. A power of two, as shapes depend on it."""
    in_text_order: bool = False
    """Whether rows are known to go left to right, so that each sees nothing but tokens before its target."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """The rows with ``change`` applied to every tensor."""
        visible = self.visible and Visible(*map(change, self.visible))
        tokens = {name: change(getattr(self, name)) for name in self._fields[:4]}
        more = {name: getattr(self, name) for name in ("weights", "starts", "counted")}
        more = {name: None if tensor is None else change(tensor) for name, tensor in more.items()}
        drafts = self.drafts and Drafts(*map(change, self.drafts))
        return self._replace(**tokens, **more, visible=visible, drafts=drafts)

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def fill(self, batch: int) -> "Rows":
        """The rows repeated cyclically to ``batch`` texts."""
        index = torch.arange(batch) % len(self.target_tokens)
        return self.map(lambda tensor: tensor[index])


def arrange(tokens_BN: np.ndarray, layout: Layout, bos_id: int, starts_BN: np.ndarray | None = None) -> Rows:
    """Gather tokens [B, N] (text order, no BOS) by a layout [B, N] or [N] shared by the batch.

    ``starts_BN``: first tokens of separate documents (``packing.starts``), for a layout of ``orders.join``.
    """
    order = np.broadcast_to(layout.order, tokens_BN.shape)
    blocks = np.broadcast_to(layout.block_ids, tokens_BN.shape)
    targets = np.take_along_axis(tokens_BN, order - 1, axis=-1)
    starts_BN = _several(starts_BN)
    origins = np.zeros_like(order) if starts_BN is None else starts_BN
    first_BN = origins == np.arange(order.shape[-1])

    def behind_bos(values: np.ndarray, of_bos: np.ndarray | int) -> np.ndarray:
        before = np.concatenate([values[:, :1], values[:, :-1]], axis=-1)
        return np.where(first_BN, of_bos, before)

    visible, reach = None, 0
    if (np.diff(blocks, axis=-1) == 0).any():
        context_blocks = _tensor(behind_bos(blocks, blocks - 1))
        target_blocks = _tensor(blocks)
        visible = Visible(
            torch.searchsorted(context_blocks, context_blocks, right=True),
            torch.searchsorted(context_blocks, target_blocks, right=False),
            torch.searchsorted(target_blocks, target_blocks, right=True),
        )
        unseen = torch.arange(1, order.shape[-1] + 1) - visible.context_of_target
        reach = 1 << (int(unseen.max()) - 1).bit_length()
    return Rows(
        context_tokens=_tensor(behind_bos(targets, bos_id)),
        context_positions=_tensor(behind_bos(order, origins) - origins),
        target_tokens=_tensor(targets),
        target_positions=_tensor(order - origins),
        visible=visible,
        starts=None if starts_BN is None else _tensor(starts_BN),
        reach=reach,
    )


def _several(starts_BN: np.ndarray | None) -> np.ndarray | None:
    """None where every sample is one document."""
    return starts_BN if starts_BN is not None and starts_BN.any() else None


def only(rows: Rows, counted_BN: np.ndarray, share: float) -> Rows:
    """Rows of which the tokens ``counted_BN`` [B, N] (text order) alone have a loss, whose weight is 1 / ``share``."""
    place_BN = rows.target_positions - 1 if rows.starts is None else rows.target_positions - 1 + rows.starts
    counted = torch.from_numpy(counted_BN).gather(1, place_BN)
    weights = counted.float() / share
    rows = rows._replace(counted=counted, weights=weights if rows.weights is None else rows.weights * weights)
    if rows.drafts:
        length = counted_BN.shape[1]
        ahead = (torch.arange(length) + rows.drafts.lags).clamp(max=length - 1)
        of_drafts = rows.drafts.weights * counted.gather(1, ahead) / share
        rows = rows._replace(drafts=rows.drafts._replace(weights=of_drafts))
    return rows


def look_ahead(rows: Rows, lags_BN: np.ndarray) -> Rows:
    """Rows of one token a block with drafts: draft row n predicts the target of row n + lag."""
    assert rows.visible is None
    length = lags_BN.shape[1]
    index_BN = np.arange(length) + lags_BN
    ends_BN = np.full_like(index_BN, length) if rows.starts is None else packing.ends(rows.starts.numpy())
    place_BN = torch.from_numpy(np.minimum(index_BN, ends_BN - 1))
    weights = torch.from_numpy((index_BN < ends_BN).astype(np.float32))
    tokens, positions = (tensor.gather(1, place_BN) for tensor in (rows.target_tokens, rows.target_positions))
    drafts = Drafts(tokens, positions, _tensor(lags_BN), weights)
    return rows._replace(drafts=drafts)


def corrupt(
    tokens_BN: np.ndarray,
    masked_BN: np.ndarray,
    weights_BN: np.ndarray,
    mask_id: int,
    starts_BN: np.ndarray | None = None,
) -> Rows:
    """Rows of masked diffusion: masked tokens are predicted from the unmasked tokens.

    The NLL of a masked token has a weight of ``weights_BN`` ([B, N] or [B, 1]), the NLL of an unmasked token the weight
    0. ``starts_BN``: first tokens of separate documents (``packing.starts``).
    """
    positions = np.broadcast_to(np.arange(1, tokens_BN.shape[1] + 1), tokens_BN.shape)
    starts_BN, visible = _several(starts_BN), None
    if starts_BN is not None:
        positions = positions - starts_BN
        visible = Visible(*[_tensor(packing.ends(starts_BN))] * 3)
    return Rows(
        context_tokens=_tensor(np.where(masked_BN, mask_id, tokens_BN)),
        context_positions=_tensor(positions),
        target_tokens=_tensor(tokens_BN),
        target_positions=_tensor(positions),
        visible=visible,
        weights=torch.from_numpy((masked_BN * weights_BN).astype(np.float32)),
        starts=None if starts_BN is None else _tensor(starts_BN),
    )


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64, order="C"))
