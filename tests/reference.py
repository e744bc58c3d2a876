"""The model once more, slow and obvious: float64, dense masks written from the definitions, one sequence, loops.

Shares nothing with the product but the names of the weights. Rows are 0 (BOS) and 1..N along the generation order;
B is the block of a row. Every mask is spelled out as a condition on B.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from armd_scale.inference import ARMDConfig


def log_probabilities(
    weights: dict[str, Tensor],
    c: ARMDConfig,
    tokens: list[int],
    order: list[int],
    blocks: list[int],
    drafts: list[tuple[int, int]] | None = None,
):
    """Log-probabilities of every target along the order, [N, V] float64.

    ``drafts``: numbers of known tokens, and positions: log-probabilities of draft rows instead, [drafts, V].

    ``ar``, ``card``: the order is left to right; the tokens of ``card`` may be masked (V). ``mdm``:
    of every token of the text, some of which are the mask token V.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    if c.objective in ("ar", "card"):
        ids, places = [c.bos_id, *tokens[:-1]], range(len(tokens))
        return _one_stream(w, c, ids, places, [[key <= query for key in places] for query in places])
    if c.objective == "mdm":
        return _one_stream(w, c, tokens, range(1, len(tokens) + 1), [[True for _ in tokens] for _ in tokens])
    length = len(order)  # positions that are in no order are unknown
    position = [0, *order]
    ids = [c.bos_id, *(tokens[p - 1] for p in order)]
    block = [0, *blocks]
    rows, targets = range(length + 1), range(1, length + 1)

    x = torch.stack([w["embedding.weight"][i] for i in ids])
    pe = [[_position_row(w, c, p, width) for p in position] for width in c.prefix_widths]

    def seed(p: int, seen: list[int], draft: bool = False) -> Tensor:
        total = torch.zeros(c.hidden, dtype=torch.float64)
        for kernel, width in enumerate(c.prefix_widths):
            own = _position_row(w, c, p, width)
            one = sum(torch.dot(own, pe[kernel][i]) * x[i] for i in seen)
            gate = w["prefix.gate"][kernel] if c.prefix_gate else 1.0
            if draft and c.prefix_gate and c.adapter_rank:
                gate = gate + w["prefix.draft_gate"][kernel]
            total = total + one * gate
        total = total / {"none": 1.0, "sqrt": math.sqrt(len(seen)), "mean": len(seen)}[c.prefix_scale]
        if c.prefix_target_position:
            total = total + w["prefix.target_projection"] @ _position_row(w, c, p, c.prefix_widths[0])
        for i in seen:
            if c.prefix_neighbour and position[i] == p - 1:
                total = total + x[i]
        return total + w["prefix.draft_seed"] if draft and c.adapter_rank else total

    g = torch.zeros(length + 1, c.hidden, dtype=torch.float64)  # row 0 is not used
    for n in targets:
        g[n] = seed(position[n], [i for i in rows if block[i] < block[n]])
    drafts = drafts or []
    d = torch.stack([seed(p, list(range(n + 1)), draft=True) for n, p in drafts]) if drafts else g[:0]

    before_target = int(c.prefix_place == "before")
    place = [p - before_target for p in position]
    ahead = [p - before_target for _, p in drafts]
    known_x = torch.tensor([[i <= n for i in rows] for n, _ in drafts], dtype=torch.bool).view(-1, length + 1)
    known_g = torch.tensor([[0 < i <= n + 1 for i in rows] for n, _ in drafts], dtype=torch.bool).view(-1, length + 1)
    at_most = torch.tensor([[block[i] <= block[n] for i in rows] for n in rows])
    before = torch.tensor([[block[i] < block[n] for i in rows] for n in rows])
    targets_only = torch.tensor([[i > 0 for i in rows] for _ in rows])
    for index in range(c.layers):
        layer = _layer(w, index)
        if index < c.two_stream_layers:
            mlp = c.target_mlp or index == c.two_stream_layers - 1
            x, g, d = (
                _block(layer, c, x, x, position, position, at_most),
                _block(layer, c, g, x, place, position, before, mlp),
                _block(_adapted(layer, c), c, d, x, ahead, position, known_x, mlp),
            )
        else:
            g, d = (
                _block(layer, c, g, g, place, place, at_most & targets_only),
                _block(_adapted(layer, c), c, d, g, ahead, place, known_g),
            )
    return _predict(w, c, d if drafts else g[1:])


def _adapted(layer: dict[str, Tensor], c: ARMDConfig) -> dict[str, Tensor]:
    """The layer as draft rows see it: W + B A."""
    if not c.adapter_rank:
        return layer
    names = ("attention.query", "attention.output", "mlp.up", "mlp.down")
    there = [name for name in names if f"{name}_adapter.a" in layer]  # none for an MLP that G does not pass through
    return layer | {name: layer[name] + layer[f"{name}_adapter.b"] @ layer[f"{name}_adapter.a"] for name in there}


def _one_stream(w, c: ARMDConfig, ids, positions, mask) -> Tensor:
    h = torch.stack([w["embedding.weight"][i] for i in ids])
    for index in range(c.layers):
        layer = _layer(w, index)
        h = _block(layer, c, h, h, list(positions), list(positions), torch.tensor(mask))
    return _predict(w, c, h)


def _predict(w, c: ARMDConfig, rows: Tensor) -> Tensor:
    head = w["embedding.weight"] if c.tied_head else w["head.weight"]
    return (_norm(rows, w["norm.weight"], c) @ head[: c.vocab_size].t()).log_softmax(-1)


def _layer(w: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """The tensors of a layer, ``weight`` left out of their names."""
    start = f"layers.{index}."
    return {name.removeprefix(start).removesuffix(".weight"): t for name, t in w.items() if name.startswith(start)}


def _position_row(w: dict[str, Tensor], c: ARMDConfig, p: int, width: float) -> Tensor:
    if c.prefix_kernel == "learned":
        return w["prefix.table"][p]
    count = c.prefix_dim // 2
    row = []
    for part in (math.sin, math.cos):
        for k in range(count):
            if c.prefix_kernel == "gaussian":
                quantile = (1 + (k + 0.5) / count) / 2
                omega = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * quantile - 1, dtype=torch.float64)))
                omega /= width
            else:
                omega = 10000.0 ** (-k / count)
            row.append(part(omega * p) / math.sqrt(count))
    return torch.tensor(row, dtype=torch.float64)


def _block(
    layer,
    c: ARMDConfig,
    queries: Tensor,
    context: Tensor,
    place: list[int],
    position: list[int],
    mask: Tensor,
    mlp: bool = True,
) -> Tensor:
    """The whole pre-norm block: queries of one stream at ``place``, keys and values of another at ``position``."""
    width = c.head_dim
    a, b = (_norm(rows, layer["attention_norm"], c) for rows in (queries, context))
    q = _project(a, layer, "attention.query").view(-1, c.heads, width)
    kv = _project(b, layer, "attention.key_value").view(-1, c.kv_heads, 2, width).clone()
    if c.qk_norm:
        q = _rms(q, c) * layer["attention.query_norm"]
        kv[:, :, 0] = _rms(kv[:, :, 0], c) * layer["attention.key_norm"]
    out = torch.zeros(len(queries), c.heads, width, dtype=torch.float64)
    for h in range(c.heads):
        group = h // (c.heads // c.kv_heads)
        for n in range(len(queries)):
            seen = [i for i in range(len(context)) if mask[n, i]]
            if not seen:
                continue  # row 0 of G
            query = _rope(q[n, h], place[n], c)
            keys = torch.stack([_rope(kv[i, group, 0], position[i], c) for i in seen])
            weight = (keys @ query / math.sqrt(width)).softmax(0)
            out[n, h] = weight @ torch.stack([kv[i, group, 1] for i in seen])
    h = queries + out.flatten(1) @ layer["attention.output"].t()
    if not mlp:
        return h
    inner = _norm(h, layer["mlp_norm"], c) @ layer["mlp.up"].t()
    if c.mlp == "swiglu":
        gate, value = inner[:, 0::2], inner[:, 1::2]
        inner = gate * torch.sigmoid(gate) * value
    else:
        inner = F.gelu(inner, approximate="tanh")
    return h + inner @ layer["mlp.down"].t()


def _rope(vector: Tensor, position: int, c: ARMDConfig) -> Tensor:
    half = len(vector) // 2
    out = vector.clone()
    for i in range(half):
        frequency, factor = _frequency(i, half, c)
        cos, sin = factor * math.cos(position * frequency), factor * math.sin(position * frequency)
        out[i] = vector[i] * cos - vector[i + half] * sin
        out[i + half] = vector[i + half] * cos + vector[i] * sin
    return out


def _frequency(i: int, half: int, c: ARMDConfig) -> tuple[float, float]:
    """Frequency of a pair, and the factor of its rotation, for models without scaling and with yarn."""
    frequency, scaling = c.rope_base ** (-i / half), c.rope
    if not scaling:
        return frequency, 1.0
    assert scaling["scaling"] == "yarn"
    # The index of the pair that turns so often within the original length, rounded outwards.
    fast, slow = (
        math.log(scaling["original_length"] / (2 * math.pi * scaling[turns])) / math.log(c.rope_base) * half
        for turns in ("high_turns", "low_turns")
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), 2 * half - 1)
    share = min(max((i - low) / (high - low), 0), 1)
    return frequency * (1 - share + share / scaling["factor"]), 0.1 * math.log(scaling["factor"]) + 1


def _project(rows: Tensor, layer, name: str) -> Tensor:
    bias = layer.get(f"{name}.bias")
    return rows @ layer[name].t() + (0 if bias is None else bias)


def _rms(rows: Tensor, c: ARMDConfig) -> Tensor:
    return rows / (rows.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt()


def _norm(rows: Tensor, scale: Tensor, c: ARMDConfig) -> Tensor:
    if c.norm == "layernorm":
        rows = rows - rows.mean(-1, keepdim=True)
    return _rms(rows, c) * scale


def chi_square(found, expected):
    """Sampled counts against expected ones, at about five standard deviations of the statistic."""
    statistic = sum((a - b) ** 2 / b for a, b in zip(found, expected, strict=True))
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), statistic
