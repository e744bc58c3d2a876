"""Floating-point operations of the network, the basis of MFU.

Counted: matrix products and causal attention that are really done, two operations a multiply-add; the backward
pass is twice the forward pass; recomputation, norms and activations are not counted.
"""

from armd_scale.config import ModelConfig
from armd_scale.model.prefix import CHUNK

FORMULA = (
    "3 x 2 x (projections + MLP of both streams, K and V of one; causal attention N d per stream and layer; "
    "prefix aggregation; head) per token"
)

# Dense bf16 peak in FLOP/s, from the makers' data sheets (without sparsity).
PEAKS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12}


def training_flops_per_token(config: ModelConfig) -> float:
    """FLOPs of one target token in training, forward and backward."""
    d, kv = config.hidden, config.key_heads * config.head_dim
    mlp = (3 if config.mlp == "swiglu" else 2) * d * config.ffn_width
    rows = 2 * (config.two_stream - 1) + (config.layers - config.two_stream + 1)  # streams that leave each layer
    attention = config.length * d  # scores and sums over N / 2 keys on average
    macs = rows * (2 * d * d + mlp + attention) + config.layers * 2 * d * kv
    macs += CHUNK * (config.prefix_dim + d) + 2 * config.prefix_dim * d
    macs += d * config.padded_vocab
    return 3 * 2 * macs


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, None when it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)
