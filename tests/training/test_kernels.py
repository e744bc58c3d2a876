"""Which attention kernel a run uses."""

import json

import pytest
import torch

from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.model import attention
from armd_scale.training import kernels
from tests.conftest import MODERN

CPU = torch.device("cpu")


def config(folder, **train):
    fields = {"steps": 2, "global_batch": 4, "micro_batch": 2, "dtype": "float32"} | train
    orders = {"ar_steps": 1, "permutation_steps": 2, "rho": 4}
    return RunConfig.model_validate(
        {"run_dir": str(folder), "model": MODERN.model_dump(), "orders": orders, "train": fields}
    )


def test_shapes_are_those_of_the_layers(tmp_path):
    """Both streams in one call while both live, and the last layer with two streams computes one."""
    run, model = config(tmp_path), MODERN
    heads = model.key_heads, model.heads // model.key_heads, model.length, model.head_size
    both, single = (2, 2, *heads), (1, 2, *heads)
    assert kernels.shapes(run) == {both: model.two_stream - 1, single: model.layers - model.two_stream + 1}


def test_the_table_is_measured_once(tmp_path, monkeypatch):
    run = config(tmp_path)
    assert kernels._measured(run, CPU) == "flash"
    table = json.loads(run.run_directory.attention_path.read_text())
    assert table["seconds"]["flash"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(attention, "measure", lambda *_: pytest.fail("measured again"))
        assert kernels._measured(run, CPU) == "flash"
    for damaged in ('{"chosen": ', "[]", json.dumps({name: table[name] for name in table if name != "chosen"})):
        run.run_directory.attention_path.write_text(damaged)
        assert kernels._measured(run, CPU) == "flash", "a damaged table is measured anew"
    tables = {"flash": 2.0, "cudnn": 1.0}
    monkeypatch.setattr(attention, "measure", lambda shape, *_: tables if shape[0] == 2 else {"flash": 5.0})
    wider = config(tmp_path, micro_batch=4)
    assert kernels._measured(wider, CPU) == "flash", "the other does not run for all shapes"
    tables["cudnn"], tables["flash"] = 1.0, 1.5
    monkeypatch.setattr(attention, "measure", lambda shape, *_: tables)
    assert kernels._measured(config(tmp_path, dtype="bfloat16"), CPU) == "cudnn"


def test_a_kernel_by_name(tmp_path):
    assert kernels.attention_kernel(config(tmp_path), CPU) is None
    assert kernels.attention_kernel(config(tmp_path, attention="flash"), CPU) == "flash"
    for name in ("cudnn", "FA3"):
        with pytest.raises(UserError, match=f"^train.attention = {name} cannot run"):
            kernels.attention_kernel(config(tmp_path, attention=name), CPU)


def test_fp8_on_a_gpu_needs_transformer_engine(tmp_path):
    kernels.check_fp8(config(tmp_path, fp8=True), CPU)
    with pytest.raises(UserError, match="pip install 'transformer-engine"):
        kernels.check_fp8(config(tmp_path, fp8=True), torch.device("cuda", 0))
    fields = config(tmp_path, fp8=True).model_dump()
    with pytest.raises(ValueError, match="multiples of 16, but model.length = 8"):
        RunConfig.model_validate(fields | {"model": fields["model"] | {"length": 8}})
