"""From a checkpoint of any layout to a model directory: in several files, and in little memory."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from armd_scale import config_files, inference
from armd_scale.config import RunConfig, with_vocabulary
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.shards import fill_vocabulary
from armd_scale.errors import UserError
from armd_scale.inference import InputError
from tests.conftest import PAPER, model_folder, run_processes
from tests.runs import PANGRAMS, run, start

MB = 1_000_000


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """One step of a model of 100 MB in float32, saved by tensor 2 x pipeline 2 (interleaved)."""
    folder = tmp_path_factory.mktemp("wide") / "run"
    fields = run(data, data / "text.jsonl", folder, 4, 2).model_dump()
    fields["model"] |= {"layers": 8, "hidden": 512}
    fields["orders"] |= {"ar_steps": 0, "permutation_steps": 0, "strided_steps": 0}
    fields["train"] |= {"steps": 1, "global_batch": 4, "checkpoint_every": 1, "eval_every": 10}
    fields["parallel"] |= {"pipeline": 2, "chunks": 2, "sequence": True}
    start(RunConfig.model_validate(fields))
    return RunConfig.model_validate(fields)


def _export(rank, count, rendezvous, config, out, file_bytes):
    """Export in this process; its facts, and the growth of memory that is not a mapped file."""
    from armd_scale.config import with_vocabulary
    from armd_scale.data.shards import PackedDataset
    from armd_scale.training import export

    index = PackedDataset(config.data_directory / "train").index
    config = with_vocabulary(config, index["vocab_size"], index["bos_id"])
    before, most, done = _anonymous(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.002):
            most = max(most, _anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    facts = export.export(config, export.newest_checkpoint(config), out, file_bytes=file_bytes)
    done.set()
    thread.join()
    return facts, most - before


def _anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_large_models_become_several_files_in_little_memory(trained, tmp_path):
    """The weights are 100 MB, the checkpoint 400 MB, a file 16 MB, a layer 13 MB: a fraction of the model is held."""
    [(facts, grown)] = run_processes(1, _export, trained, tmp_path / "model", 16 * MB)
    size = 4 * facts["parameters"]
    assert size > 100 * MB
    assert facts["difference"] < 1e-4
    assert grown < 0.6 * size, f"{grown / MB:.0f} MB for {size / MB:.0f} MB of weights"
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) >= 7
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 17 * MB for file in files)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    assert sum(param.numel() for param in inference.load(tmp_path / "model").parameters()) == facts["parameters"]
    _loads_in_transformers(tmp_path / "model", facts["parameters"], tmp_path / "modules")
    files[2].unlink()
    with pytest.raises(InputError, match=rf"{files[2].name} is missing"):
        inference.load(tmp_path / "model")
    (tmp_path / "model/model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match=r"index.json cannot be read"):
        inference.load(tmp_path / "model")


def _loads_in_transformers(folder, parameters, modules):
    code = (
        "import sys; from transformers import AutoModelForCausalLM as Auto;"
        "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "print(sum(param.numel() for param in model.parameters()), float(model.model.norm.weight.sum()))"
    )
    env = {**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, total = done.stdout.split()
    assert int(count) == parameters
    assert float(total) == pytest.approx(float(inference.load(folder).norm.weight.sum()))


def _export_again(rank, count, rendezvous, config, source, out):
    from armd_scale.training import export

    with pytest.raises(UserError) as error:
        export.export(fill_vocabulary(config_files.load_run(config.run_directory)), source, out)
    return str(error.value)


def test_what_is_there_is_not_lost(trained, tmp_path):
    """Folders of other things, checkpoints of other runs, and an export that died between its two renames."""
    source = next((trained.directory / "checkpoints").glob("step-*"))
    config_files.save(trained, trained.directory / "config.yaml")
    out = tmp_path / "mine"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "thesis.txt").write_text("years of work")
    for held, line in (("thesis.txt", "thesis.txt"), (None, "is not a model directory")):
        if held is None:
            (out / "thesis.txt").unlink()
        assert line in run_processes(1, _export_again, trained, source, out)[0]
    other = tmp_path / "other"
    other.mkdir()
    fields = trained.model_dump()
    fields["model"]["rope_base"] = 500.0
    fields["run_dir"] = str(other)
    config_files.save(RunConfig.model_validate(fields), other / "config.yaml")
    line = run_processes(1, _export_again, RunConfig.model_validate(fields), source, tmp_path / "new")[0]
    assert "another 'model'" in line
    assert not (tmp_path / "new").exists()
    # died after the first rename: the old model is under another name, and comes back before anything else happens
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old/notes.txt").write_text("the old model")
    run_processes(1, _export_again, trained, source, tmp_path / "model")
    assert (tmp_path / "model/notes.txt").read_text() == "the old model"


def test_a_model_without_an_adapter_gets_one(tmp_path):
    """Checkpoint 0 has the laws of the model, bit for bit, and the adapter as it begins."""
    from armd_scale.training import export

    tokenizer = tokenizers.train([PANGRAMS * 30], tmp_path / "tokenizer.model", 290)
    (tmp_path / "model").mkdir()
    folder = model_folder(tmp_path / "model", PAPER, tokenizer)
    fields = PAPER.model_dump() | {"vocab_size": None, "bos_id": None, "adapter": {"rank": 2}}
    begun = {"run_dir": str(tmp_path / "run"), "data": {"tokenizer": str(folder)}, "orders": {"rho": 8}}
    config = RunConfig.model_validate(begun | {"model": fields})
    source = export.to_training(folder, config)
    full = with_vocabulary(config, tokenizer.vocab_size, tokenizer.bos_id)
    model, old = export.in_memory(full, source)[0], inference.load(folder)
    tokens = torch.randint(0, 290, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.logits(tokens), old.logits(tokens))
    assert torch.equal(
        model.acceptance(tokens, 1) == old.acceptance(tokens, 1), torch.zeros(1, 2, 15, dtype=torch.bool)
    )
    more = {name: tensor for name, tensor in model.state_dict().items() if name not in old.state_dict()}
    assert more.keys() >= {"prefix.draft_seed", "layers.0.attention.query_adapter.a"}
    assert all(tensor.any() != name.endswith(".b") for name, tensor in more.items())
