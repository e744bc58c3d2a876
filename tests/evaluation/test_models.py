"""Baselines end to end: trained on several processes, scored from the checkpoint and from the model directory."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from armd_scale import config_files, inference
from armd_scale.config import RunConfig
from armd_scale.data.shards import PackedDataset
from armd_scale.errors import UserError
from armd_scale.evaluation.models import open_model
from armd_scale.objectives.interface import training
from tests.conftest import run_processes
from tests.runs import run, start
from tests.training.test_export import _export


@pytest.mark.parametrize(
    ("objective", "parallel"),
    [
        ("ar", {"tensor": 2}),
        ("mdm", {"pipeline": 2}),
        ("armd", {"tensor": 2, "zero": 0}),
        ("card", {"tensor": 2, "sequence": True}),
    ],
)
def test_a_checkpoint_is_scored_as_it_is(data, tmp_path, objective, parallel):
    """The model of the newest checkpoint, of any layout, is the exported one, and the one that was trained."""
    fields = run(data, data / "text.jsonl", tmp_path / "run", 2, 1).model_dump()
    fields |= {"objective": objective}
    fields["parallel"] |= parallel
    fields["model"] |= {"qk_norm": objective == "card", "qkv_bias": objective == "card"}
    config = RunConfig.model_validate(fields)
    records = start(config)
    config_files.save(config, config.directory / "config.yaml")
    name, *others = (f"heldout_{kind}" for kind in training(objective).kinds(config))
    last = [record for record in records if name in record][-1]
    assert all(other in last for other in others)
    run_processes(1, _export, config, tmp_path / "out", 10**9)
    modes = {path.stat().st_mode for path in (tmp_path / "out").glob("*.*")}
    assert len(modes) == 1, "every file is readable by those whom the umask lets read"
    exported, (model, tokenizer) = inference.load(tmp_path / "out"), open_model(config.directory)
    assert (model.config, tokenizer.vocab_size) == (exported.config, exported.config.vocab_size)
    for key, tensor in exported.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    if objective != "armd":  # the card's code of that one runs in the tests of the main job
        code = (tmp_path / "out" / "README.md").read_text().split("```")[1].removeprefix("python\n")
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True)
    heldout = PackedDataset(config.data_directory / "heldout")
    numbers = np.arange(6) * len(heldout) // 6
    tokens = torch.from_numpy(heldout.read(numbers))
    if objective == "mdm":
        full = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})})
        rows = training(full.objective).heldout_rows(full, "bound", tokens.numpy(), range(6))
        logp = model.predict(model.denoise(rows.context_tokens)).log_softmax(-1)
        score = float((-logp.gather(-1, tokens[..., None])[..., 0] * rows.weights).mean())
    else:
        score = float(model.nll(tokens).mean())
    assert score == pytest.approx(last[name], abs=2e-5)
    place = config.directory / "checkpoints" / f"step-{config.train.steps:08d}"
    before = open_model(place)[0]
    assert torch.equal(before.norm.weight, model.norm.weight) == (objective != "armd")  # armd went on, strided


def test_nothing_to_open(tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        open_model(tmp_path)
