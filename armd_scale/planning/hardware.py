"""Peak rates of GPUs, and the assumed shares of the peaks that kernels reach.

The peaks come from the manufacturers' data sheets. The shares are assumptions.
"""

from dataclasses import dataclass

from armd_scale.errors import UserError
from armd_scale.model.flops import PEAKS


@dataclass(frozen=True)
class GPU:
    """A device and its links. Rates are per second and in one direction."""

    name: str
    memory: float
    """Bytes of device memory."""
    flops: float
    """Dense bfloat16 peak."""
    flops_tf32: float
    """TensorFloat-32 peak, the rate of float32 products in a bfloat16 run."""
    flops_float32: float
    """Float32 peak outside the tensor cores, the rate of a float32 run."""
    bandwidth: float
    """Bytes read from or written to device memory."""
    link: float
    """Bytes sent to other GPUs of the node."""
    network: float
    """Bytes to other nodes, per GPU."""
    cuda: bool = True
    """False: processes on CPU, for which only memory is planned."""

    def operation(self, flops: float, moved: float, rate: float) -> float:
        """Seconds of a kernel: the maximum of arithmetic, memory traffic and launch (roofline)."""
        return max(flops / (rate * ARITHMETIC), moved / (self.bandwidth * MEMORY), LAUNCH)


ARITHMETIC = 0.70
"""Share of the peak that large matrix products reach."""
MEMORY = 0.80
"""Share of the memory bandwidth that other kernels reach."""
COMMUNICATION = 0.75
"""Share of a link's rate that collectives reach."""
LAUNCH = 3e-6
"""Minimum time of a kernel in seconds if the launch queue is never empty."""
RESERVED = 4e9
"""Bytes of a GPU for the CUDA context, NCCL's buffers and fragmentation."""

GPUS = {
    "h100": GPU(
        "H100 SXM 80 GB", memory=85.0e9, flops=PEAKS["H100"], flops_tf32=495e12, flops_float32=67e12,
        bandwidth=3.35e12, link=450e9, network=50e9,
    ),
    "h200": GPU(
        "H200 SXM 141 GB", memory=150.1e9, flops=PEAKS["H200"], flops_tf32=495e12, flops_float32=67e12,
        bandwidth=4.8e12, link=450e9, network=50e9,
    ),
    "a100": GPU(
        "A100 SXM 80 GB", memory=85.0e9, flops=PEAKS["A100"], flops_tf32=156e12, flops_float32=19.5e12,
        bandwidth=2.04e12, link=300e9, network=25e9,
    ),
    "cpu": GPU(
        "CPU", memory=float("inf"), flops=1, flops_tf32=1, flops_float32=1, bandwidth=1, link=1, network=1, cuda=False,
    ),
}  # fmt: skip


def find(name: str) -> GPU:
    """A GPU by its name in ``GPUS``."""
    if name.lower() not in GPUS:
        raise UserError(f"the GPU '{name}' is unknown: choose one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
