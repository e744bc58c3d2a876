"""Profiles of steps in a real run, and GPU memory in its records."""

import gzip
import json

import numpy as np
import torch

from armd_scale.config import RunConfig, identity
from armd_scale.training import profiling
from tests.runs import figures, run, start


def test_a_profile_of_some_steps(data, tmp_path):
    """Two pipeline stages of two ranks: the first rank of each writes its trace, and the losses stay."""

    def config(name, **train):
        fields = run(data, data / "text.jsonl", tmp_path / name, processes=4, **train).model_dump()
        fields["parallel"] |= {"pipeline": 2}
        return RunConfig.model_validate(fields)

    plain, profiled = config("plain"), config("profiled", profile=[3, 4])
    assert identity(plain) == identity(profiled)
    expected = figures(start(plain))
    assert figures(start(profiled)) == expected
    assert not (plain.directory / "profiles").exists()
    paths = sorted((profiled.directory / "profiles").iterdir())
    assert paths == [profiled.run_directory.profile_path(rank, 3, 4) for rank in (0, 2)]
    for path in paths:
        names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert {name for name in names if name and name.startswith("step ")} == {"step 3", "step 4"}
        assert "aten::mm" in names
    # a resumed run with another range
    for step in (6, 8):
        for file in profiled.run_directory.checkpoint(step).iterdir():
            file.unlink()
        profiled.run_directory.checkpoint(step).rmdir()
    assert figures(start(config("profiled", profile=[2, 5]))) == expected
    resumed = profiled.run_directory.profile_path(0, 2, 5)
    names = {event.get("name") for event in json.loads(gzip.decompress(resumed.read_bytes()))["traceEvents"]}
    assert "step 5" in names
    assert "step 4" not in names, "the checkpoint is of step 4"


def test_a_full_disk_costs_a_profile_and_not_the_run(tmp_path, monkeypatch):
    config = RunConfig.model_validate({"run_dir": str(tmp_path), "train": {"profile": [1, 1]}})
    profiler = profiling.Profiler(config, rank=0, active=True)
    with profiler.step(1):
        torch.zeros(3).sum()
    (tmp_path / "profiles").write_text("in the way")
    assert profiler.ends_with(1)
    profiler.close()
    profiler.close()
    with profiler.step(1):
        assert profiler._profile is None, "a job writes one profile"


def test_memory_of_a_gpu(monkeypatch):
    assert profiling.gpu_memory(torch.device("cpu")) == ()
    assert profiling.memory_record(np.zeros((4, 0))) == {}
    counts = {"memory_allocated": 1, "memory_reserved": 3, "max_memory_allocated": 2}
    for name, count in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, count=count: count * 10**9)
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    device = torch.device("cuda", 0)
    assert profiling.gpu_memory(device) == [1.0, 3.0, 2.0]
    assert reset == [device]
    figures = np.array([[1.0, 3.0, 2.0], [2.0, 3.0, 1.0]])
    assert profiling.memory_record(figures) == {
        "memory_allocated_gb": 2.0, "memory_reserved_gb": 3.0, "memory_peak_gb": 2.0,
    }  # fmt: skip
