"""Small training runs on gloo."""

import torch

from armd_scale.config import RunConfig
from armd_scale.training import manifest
from tests.conftest import run_processes

PANGRAMS = "the quick brown fox jumps over a lazy dog while seven wizards quietly judge my vow of black quartz"


def run(folder, text, run_dir, processes=1, tensor=1, **train):
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "model": {"layers": 2, "hidden": 32, "heads": 2, "length": 32},
            "orders": {"ar_steps": 2, "permutation_steps": 4, "rho": 8, "strided_steps": 2, "streams": [1, 2, 4]},
            "data": {
                "text": [str(text)],
                "directory": str(folder / "data"),
                "vocab_size": 300,
                "heldout_fraction": 0.1,
                "samples_per_shard": 16,
            },
            "optimizer": {"lr": 3e-3, "warmup_steps": 2, "schedule": "cosine", "ema": 0.9, "eps": 1e-5},
            "train": {
                "steps": 6, "global_batch": 8, "micro_batch": 2, "dtype": "float32", "log_every": 1, "eval_every": 3,
                "eval_samples": 6, "checkpoint_every": 2, "keep_checkpoints": 9, **train,
            },
            "report": {"wandb": "disabled"},
            "parallel": {"tensor": tensor},
            "cluster": {"tasks_per_node": processes},
        }
    )  # fmt: skip


def start(config):
    config.directory.mkdir(parents=True, exist_ok=True)
    run_processes(config.cluster.processes, train, config)
    return config.run_directory.metrics()


def train(rank, processes, rendezvous, config):
    from armd_scale.training import loop

    loop.train(config, rank, processes, rank, rendezvous)


def write_checkpoint(run, step):
    """A checkpoint of one small file."""
    partial = run.partial_checkpoint(step)
    partial.mkdir(parents=True)
    (partial / "data").write_text(str(step))
    manifest.write(partial, {"step": step})
    manifest.publish(run, step)


def figures(records):
    """What must be equal bit for bit: everything but the times."""
    return [{k: v for k, v in record.items() if "second" not in k and k != "slow_ranks"} for record in records]


def tensors(checkpoint, raw=True):
    from torch.distributed.checkpoint import FileSystemReader, load

    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    target = {key: torch.empty(entry.size) for key, entry in entries.items()}
    load(target, checkpoint_id=checkpoint, no_dist=True)
    assert {key.partition("/")[0] for key in target} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    return {key: tensor.numpy().tobytes() if raw else tensor for key, tensor in target.items()}
