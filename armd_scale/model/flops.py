"""Floating-point operations of the network, the basis of MFU.

Counted are matrix products and attention over visible keys, two operations per multiply-add; the backward pass counts
twice the forward pass. Recomputation, norms and activations are not counted.
"""

import itertools

from armd_scale.config import ModelConfig, RunConfig
from armd_scale.model.prefix import rows_of_chunk

# Dense bf16 peak in FLOP/s from data sheets, without sparsity.
PEAKS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12}


def training_flops_per_token(config: ModelConfig) -> float:
    """FLOPs of one target token in training, forward and backward."""
    layers = sum(layer_macs(config, index) for index in range(config.layers))
    return 3 * 2 * (embedding_macs(config) + layers + head_macs(config))


def layer_macs(config: ModelConfig, index: int) -> float:
    """Multiply-adds of layer ``index`` in the forward pass of one target token."""
    d, q, kv = config.hidden, config.heads * config.head_size, config.key_heads * config.head_size
    mlp = (3 if config.mlp == "swiglu" else 2) * d * config.ffn_width
    streams = 2 if index < config.two_stream - 1 else 1  # the last two-stream layer computes G alone
    # Scores and sums over N / 2 keys on average, or over all of them.
    attention = config.length * q * (1 if config.traits.causal else 2)
    return streams * (2 * d * q + attention) + (streams if config.target_mlp else 1) * mlp + 2 * d * kv


def embedding_macs(config: ModelConfig) -> float:
    """Multiply-adds of prefix aggregation for one target token; looking embeddings up costs none."""
    if config.traits.streams == 1:
        return 0.0
    chunk, width = rows_of_chunk(config), config.prefix_dim
    looked_up = chunk * config.hidden + (chunk * width if config.prefix.kernel == "learned" else 0)
    of_kernel = looked_up + (2 * width * config.hidden if chunk < config.length else 0)
    return len(config.prefix.widths) * of_kernel


def head_macs(config: ModelConfig) -> float:
    """Multiply-adds of the output projection for one target token."""
    return config.hidden * config.padded_vocab


def balanced_cuts(config: ModelConfig, stages: int) -> list[int]:
    """First layers of all stages but the first, such that the most expensive of ``stages`` stages costs least.

    The first stage also seeds the targets, the last stage also has the head. Every stage has a layer.
    """
    layers = _costs(config)
    before = [0.0, *itertools.accumulate(layers)]
    # best[stop]: (cost of the most expensive stage, first layers) of layers 0..stop-1 in the stages so far
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for count in range(1, stages + 1):
        best = {
            stop: min(
                (max(cost, before[stop] - before[start]), [*starts, start])
                for start, (cost, starts) in best.items()
                if start < stop
            )
            for stop in range(count, config.layers - (stages - count) + 1)
        }
    return best[config.layers][1][1:]


def _costs(config: ModelConfig) -> list[float]:
    """Multiply-adds of every layer, with those of the embedding in the first and of the head in the last."""
    layers = [layer_macs(config, index) for index in range(config.layers)]
    layers[0] += embedding_macs(config)
    layers[-1] += head_macs(config)
    return layers


def stage_edges(config: RunConfig) -> list[int]:
    """First layer of every (virtual) pipeline stage, then the number of layers."""
    parallel = config.parallel
    cut = parallel.cut
    if cut is None:
        cut = balanced_cuts(config.model, parallel.pipeline * parallel.chunks)
    return [0, *cut, config.model.layers]


def stage_costs(config: RunConfig) -> list[float]:
    """Share of every (virtual) pipeline stage in the FLOPs of a token."""
    layers = _costs(config.model)
    return [sum(layers[a:b]) / sum(layers) for a, b in itertools.pairwise(stage_edges(config))]


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, None when it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)
