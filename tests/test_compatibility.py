"""Data sets, checkpoints and model directories of version 0.1 still give the same numbers.

``fixtures/v0.1`` was written by that version: ``text.jsonl``, the data set of it, a run stopped at step 4 of 8, model
directories of an ``armd`` and an ``mdm`` run, and ``expected.json``: the figures of the rest of the run and of the
models.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from armd_scale import config_files, inference, orders
from armd_scale.data.shards import DOCUMENTS, PackedDataset
from data_pipeline import prepare
from tests.runs import figures, start

OLD = Path(__file__).parent / "fixtures" / "v0.1"
EXPECTED = json.loads((OLD / "expected.json").read_text())


def test_a_data_set_is_prepared_to_the_same_tokens(tmp_path, monkeypatch):
    """The same bytes but for the shards, which have borders of documents since."""
    shutil.copy(OLD / "text.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    prepare.prepare(config_files.load(OLD / "run" / "config.yaml"))
    for path in (OLD / "data").rglob("*"):
        if path.suffix in (".model", ".parquet"):
            assert (tmp_path / "data" / path.relative_to(OLD / "data")).read_bytes() == path.read_bytes(), path
    for split in ("train", "heldout"):
        before, now = (PackedDataset(place / "data" / split) for place in (OLD, tmp_path))
        numbers = range(len(before))
        assert np.array_equal(now.read(numbers), before.read(numbers))
        assert np.array_equal(now.tail(), before.tail())
        assert not before.has(DOCUMENTS)


def test_a_run_resumes_from_a_checkpoint(tmp_path, monkeypatch):
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    records = start(config_files.load("run/config.yaml"))
    found = figures([record for record in records if record["step"] > 4])
    for one, expected in zip(found, EXPECTED["records"], strict=True):
        assert one.keys() == expected.keys()
        for name, value in expected.items():  # on another kind of CPU, sums differ in their last digits
            assert one[name] == (value if isinstance(value, str | None) else pytest.approx(value, rel=1e-6)), name


@pytest.fixture(params=["package", "own code"])
def load(request):
    """Loads a model directory with the package, or with the code that the directory holds."""
    if request.param == "package":
        return lambda name: (inference, inference.load(OLD / name))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"old_{name}", OLD / name / "modeling_armd.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, module.load(OLD / name)

    return load


def test_an_armd_model_directory_scores_and_writes_as_before(load):
    code, model = load("armd")
    tokens, strided = torch.tensor(EXPECTED["tokens"]), orders.strided(20, 4)
    layout = torch.from_numpy(strided.order), torch.from_numpy(strided.block_ids)
    torch.testing.assert_close(model.nll(tokens), torch.tensor(EXPECTED["nll"]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.nll(tokens, *layout), torch.tensor(EXPECTED["strided_nll"]), atol=1e-5, rtol=1e-5)
    ways = [("generated", code.Decoding(streams=3))]
    if code is not inference:  # the package proposes other drafts, so it draws another text of the same law
        ways.append(("exact", code.Decoding(draft=3)))
    for name, decoding in ways:
        assert model.generate([[5, 6, 7]], length=24, decoding=decoding, seed=4).tolist() == EXPECTED[name]


def test_an_mdm_model_directory_scores_and_writes_as_before(load):
    code, model = load("mdm")
    bound = model.bound(torch.tensor(EXPECTED["tokens"]), 4, seed=3)
    torch.testing.assert_close(bound, torch.tensor(EXPECTED["bound"], dtype=bound.dtype), atol=1e-4, rtol=1e-6)
    text = model.generate([[5, 6, 7]], length=24, decoding=code.Decoding(steps=6), seed=4)
    assert text.tolist() == EXPECTED["ancestral"]
