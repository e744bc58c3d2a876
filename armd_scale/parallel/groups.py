"""Process groups: torch.distributed, Megatron-Core's model-parallel groups, and DeepSpeed's view of them.

- ``start``: joins the processes of a job and builds the groups of a layout;
- ``replicas``: the ranks over which gradients are averaged and ZeRO shards;
- ``shards``: the ranks that split each layer;
- ``transformer_config``: Megatron-Core's description of the model and layout;
- ``MegatronTopology``: the "mpu" interface of DeepSpeed.
"""

import datetime
import os
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from armd_scale.config import ModelConfig, ParallelConfig
from armd_scale.parallel import megatron_cpu


def start(
    parallel: ParallelConfig,
    *,
    rank: int,
    processes: int,
    rendezvous: str | Path,
    device: torch.device,
    backend: str | None = None,
) -> None:
    """Join ``processes`` processes and build the groups of a layout.

    ``rendezvous``: an init method of torch.distributed (``tcp://host:port``) or the path of a file on a shared disk.
    ``backend``: of torch.distributed, by default NCCL for GPUs and gloo for CPUs.
    """
    megatron_cpu.install()
    # DeepSpeed reads these variables even if the group exists.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(device.index or 0))
    method = str(rendezvous) if "://" in str(rendezvous) else f"file://{Path(rendezvous).resolve()}"
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    dist.init_process_group(
        backend, init_method=method, rank=rank, world_size=processes, timeout=datetime.timedelta(minutes=30)
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.chunks if parallel.chunks > 1 else None,
        context_parallel_size=parallel.context,
    )


def replicas() -> dist.ProcessGroup:
    """The data-parallel x context-parallel ranks, which hold the same weights."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def shards() -> dist.ProcessGroup:
    """The tensor-parallel ranks, which hold parts of the same weights."""
    return parallel_state.get_tensor_model_parallel_group()


def stop() -> None:
    """Leave the groups."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, fp8: bool = False
) -> TransformerConfig:
    """Megatron-Core's configuration: the shapes that its schedules read, and the layout."""
    # Freeing sent activations while they may still be in flight gave wrong gradients on gloo.
    cuda = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.key_heads,
        ffn_hidden_size=model.ffn_width,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.chunks if parallel.chunks > 1 else None,
        batch_p2p_comm=False,  # with interleaving it silently gives wrong gradients
        overlap_p2p_comm=cuda and parallel.chunks > 1,
        deallocate_pipeline_outputs=cuda,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp8="hybrid" if fp8 else None,
        fp8_recipe="tensorwise",  # other recipes keep histories, which checkpoints would have to hold
        disable_parameter_transpose_cache=True,  # the cache would keep the FP8 weights of the first step
        perform_initialization=False,
        use_cpu_initialization=not cuda,
        gradient_accumulation_fusion=False,
    )


class MegatronTopology:
    """The "mpu" interface of DeepSpeed over Megatron-Core's groups; "model parallel" is tensor x pipeline, and "data
    parallel" is data x context: DeepSpeed averages gradients over it and shards over it.

    ``count_by_tensor_rank``: ZeRO-3 counts replicated weights in the gradient norm on model-parallel rank 0 only, so
    under ZeRO-3 the model-parallel rank is the tensor-parallel rank.
    """

    def __init__(self, count_by_tensor_rank: bool = False) -> None:
        self._count_by_tensor_rank = count_by_tensor_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        if self._count_by_tensor_rank:
            return parallel_state.get_tensor_model_parallel_rank()
        return dist.get_rank(self.get_model_parallel_group())

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_world_size(self) -> int:
        return parallel_state.get_pipeline_model_parallel_world_size()

    def get_pipeline_model_parallel_rank(self) -> int:
        return parallel_state.get_pipeline_model_parallel_rank()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return replicas()

    def get_data_parallel_world_size(self) -> int:
        return replicas().size()

    def get_data_parallel_rank(self) -> int:
        return replicas().rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(replicas())
