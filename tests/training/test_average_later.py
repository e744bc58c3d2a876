"""A moving average of the weights that a run begins at a resume."""

import shutil

import pytest
import torch

from armd_scale import config as configs
from armd_scale.config import RunConfig
from armd_scale.data.shards import PackedDataset
from tests.conftest import run_processes
from tests.runs import run, start


def changed(config, **sections):
    fields = config.model_dump()
    for name, values in sections.items():
        fields[name] |= values
    return RunConfig.model_validate(fields)


@pytest.fixture(scope="module")
def without(data, tmp_path_factory):
    """A finished run with ``optimizer.ema = 0``."""
    config = run(data, data / "text.jsonl", tmp_path_factory.mktemp("run") / "run", steps=4, checkpoint_every=2)
    config = changed(config, optimizer={"ema": 0.0, "schedule": "constant"}, orders={"strided_steps": 0})
    start(config)
    return config


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_it_starts_from_the_weights(without, zero):
    config = changed(without, optimizer={"ema": 0.9}, parallel={"zero": zero}, cluster={"tasks_per_node": 2})
    assert run_processes(2, _differences, config) == [0.0, 0.0]


def _differences(rank, processes, rendezvous, config):
    """The largest difference between the average and the weights after loading."""
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine
    from armd_scale.parallel.optimizer import EMA, MASTER
    from armd_scale.training import checkpoint

    index = PackedDataset(config.data_directory / "train").index
    config = configs.with_vocabulary(config, index["vocab_size"], index["bos_id"])
    device = torch.device("cpu")
    groups.start(config.parallel, rank=rank, processes=processes, rendezvous=rendezvous, device=device)
    engine = Engine(config, device)
    checkpoint.load(engine, config.run_directory.newest_checkpoint())
    engine.link_states()
    differences = []
    for _, param in engine.named_parameters():
        average, weights = (engine.read_state(param, name).clone() for name in (EMA, MASTER))
        assert weights.abs().max() > 0
        differences.append(float((average - weights).abs().max()))
    groups.stop()
    return max(differences)


def test_the_run_says_it_and_goes_on(without, tmp_path, capfd):
    shutil.copytree(without.directory, tmp_path / "run")
    moved = without.model_copy(update={"run_dir": str(tmp_path / "run")})
    later = changed(moved, optimizer={"ema": 0.9}, train={"steps": 6})
    losses = {record["step"]: record["loss"] for record in start(later) if "loss" in record}
    line = "the moving average starts from the weights of step 4: optimizer.ema was 0 before"
    assert line in capfd.readouterr().out
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    start(changed(later, train={"steps": 8}))
    assert line not in capfd.readouterr().out
