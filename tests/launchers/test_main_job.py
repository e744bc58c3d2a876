"""The front door and the tools as a user runs them: real commands, real processes, and one line for every mistake."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from armd_scale import config_files, inference
from armd_scale.config import RunConfig
from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError
from armd_scale.run_directory import RunDirectory
from armd_scale.training import export
from launchers import jobs, restart
from tests.conftest import run_tool
from tests.launchers.test_session import SESSION

ROOT = Path(__file__).resolve().parents[2]

SMALL = """
name: small
run_dir: {run_dir}
seed: 3
model: {{layers: 2, hidden: 32, heads: 2, length: 32}}
orders: {{ar_steps: 2, permutation_steps: 4, rho: 4, strided_steps: 2, streams: [1, 2]}}
data: {{text: ["{text}"], vocab_size: 300, heldout_fraction: 0.2, samples_per_shard: 64}}
optimizer: {{lr: 0.003, warmup_steps: 2, ema: 0.5}}
train: {{steps: 6, global_batch: 8, micro_batch: 2, dtype: float32, log_every: 1, eval_every: 4, eval_samples: 8,
  checkpoint_every: 4}}
parallel: {{tensor: 2}}
report: {{prompt: "word", generate_streams: [1, 2, 4]}}
cluster: {{tasks_per_node: 2, backoff_seconds: 0.0}}
"""


def command(*words, **environment):
    if str(words[0]).startswith("tools/"):
        return run_tool(*words, **environment)
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, env=env, check=False, timeout=300
    )


def refused(result, line):
    """Exit code 2, the line on stderr, nothing that looks like a traceback."""
    assert result.returncode == 2, result.stderr
    errors = [row for row in result.stderr.splitlines() if row.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(line, errors[0]), errors[0]
    assert "Traceback" not in result.stderr + result.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": f"word number {n} and {n * n % 97} more words of text. " * 5}) for n in range(150)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """A run from text to report on two processes, started in a session of Slurm, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "small.yaml"
    config.write_text(SMALL.format(run_dir=folder / "run", text=text))
    result = command("launchers/slurm.py", "--config", config, "--cluster", "local", **SESSION)
    assert result.returncode == 0, result.stdout + result.stderr
    return config, folder / "run", result.stdout


def test_the_run_folder_holds_everything(finished):
    _, run, printed = finished
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "loss.png", "samples.md", "summary.json"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["tokens"] == 8 * 8 * 32
    assert [score["order"] for score in summary["heldout"]] == [
        "left-to-right", "shuffled:4", "strided:2", "strided:4",
    ]  # fmt: skip
    assert summary["export_difference"] < 1e-4
    assert summary["unigram_bits_per_byte"] > 0 < summary["xz_bits_per_byte"]
    accepted = summary["drafts"]["acceptance"]
    assert len(accepted) == 4
    assert all(0 < share <= 1 for share in accepted)
    assert 1 < summary["drafts"]["tokens_per_pass"] < 1 + sum(accepted)
    assert summary["environment"]["packages"]["torch"].startswith("2.")
    prompt = len(tokenizers.load(run / "export").encode("word"))
    samples = (run / "samples.md").read_text()
    for streams in (1, 2, 4):
        steps = streams + -(-(32 - prompt) // streams) - 1
        assert f"S = {streams}: {steps} steps" in samples
    assert len([r for r in RunDirectory(run).metrics() if "loss" in r]) == 8
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert not RunDirectory(run).rendezvous_paths()
    for word in ("loss.png", "left-to-right", "S = 4", "\ndata: ", "\nexport: largest difference", str(run)):
        assert word in printed


def test_heldout_figures_are_those_of_the_exported_model(finished):
    """The training loop's last evaluation (averaged weights, tensor parallel 2) and the exported model agree."""
    from armd_scale import orders
    from armd_scale.data.shards import PackedDataset

    _, run, _ = finished
    last = [r for r in RunDirectory(run).metrics() if "heldout_left_to_right" in r][-1]
    model = inference.load(run / "export")
    heldout = PackedDataset(run / "data/heldout")
    tokens = torch.from_numpy(heldout.read(np.arange(8) * len(heldout) // 8))
    assert float(model.nll(tokens).mean()) == pytest.approx(last["heldout_left_to_right"], abs=2e-5)
    order, blocks = (torch.from_numpy(f) for f in orders.strided(32, 4))
    assert float(model.nll(tokens, order, blocks).mean()) == pytest.approx(last["heldout_strided"], abs=2e-5)


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path):
    """Resumed from the one before it, the run ends where it had ended."""
    _, run, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    words = (
        "launchers/slurm.py",
        "--config",
        copy / "config.yaml",
        "--cluster",
        "local",
        "--only",
        "train",
        f"run_dir={copy}",
    )
    part = next((copy / "checkpoints/step-00000008").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-100])
    result = command(*words)
    assert result.returncode == 0, result.stderr
    assert f"{part.name} has" in result.stdout
    losses = [[r["loss"] for r in RunDirectory(folder).metrics() if "loss" in r] for folder in (run, copy)]
    assert losses[0] == losses[1]
    for part in (copy / "checkpoints").glob("*/*.distcp"):
        part.write_bytes(b"")
    result = command(*words)
    refused(result, r"all \d checkpoints")


def test_the_same_command_again_trains_no_more(finished):
    config, run, _ = finished
    before = (run / "metrics.jsonl").read_text()
    result = command("launchers/slurm.py", "--config", config, "--cluster", "local")
    assert result.returncode == 0, result.stderr
    assert (run / "metrics.jsonl").read_text() == before
    assert "train:" not in result.stdout


def test_the_resolved_configuration_reruns_the_run(finished, tmp_path):
    """Losses are those of the first run, bit for bit."""
    _, run, _ = finished
    places = f"run_dir={tmp_path}/r", f"data.directory={run}/data"
    words = "launchers/slurm.py", "--config", run / "config.yaml", "--cluster", "local", "--only", "train", *places
    result = command(*words)
    assert result.returncode == 0, result.stderr
    losses = [[r["loss"] for r in RunDirectory(folder).metrics() if "loss" in r] for folder in (run, tmp_path / "r")]
    assert losses[0] == losses[1]


def test_everything_in_one_process(finished, tmp_path):
    """--cluster debug: no other process; and what is wrong is one line here as well."""
    config, run, _ = finished
    places = f"run_dir={tmp_path}/r", f"data.directory={run}/data"
    words = "launchers/slurm.py", "--config", config, "--cluster", "debug"
    refused(command(*words), "--cluster debug .* set cluster.tasks_per_node=1")
    one = "cluster.tasks_per_node=1", "parallel.tensor=1"
    result = command(*words, *one, *places)
    assert result.returncode == 0, result.stderr
    losses = [[r["loss"] for r in RunDirectory(folder).metrics() if "loss" in r] for folder in (run, tmp_path / "r")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (tmp_path / "r/summary.json").is_file()


def test_convert_generate_evaluate(finished, tmp_path, text):
    _, run, _ = finished
    out = tmp_path / "model"
    result = command("tools/convert_ckpt.py", run, out)
    assert result.returncode == 0, result.stderr
    assert re.search(r"largest difference to the training model's logits: \d\.\de[-+]\d\d", result.stdout)
    assert {p.name for p in out.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json", "README.md",
        "modeling_armd.py", "huggingface_armd.py", "tokenization_armd.py",
    }  # fmt: skip
    # the directory's own code is enough: no package of this project on the path
    alone = subprocess.run(
        [sys.executable, "-I", "-c",
         f"import sys; sys.path.insert(0, {str(out)!r}); import modeling_armd as m; "
         f"print(m.load({str(out)!r}).generate(length=8, decoding=m.Decoding(streams=2)).shape)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert alone.stdout.strip() == "torch.Size([1, 8])"
    first, second = (
        command("tools/generate.py", out, "--prompt", "word number", "--streams", 2, "--seed", 5) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("word number")
    assert "streams 2, seed 5" in first.stderr
    figures = tmp_path / "figures.json"
    score = command(
        "tools/eval_zeroshot.py", out, "--text", text, "--order", "left-to-right", "strided:4", "--json", figures
    )
    assert score.returncode == 0, score.stderr
    results = json.loads(figures.read_text())["results"]
    tokenizer = tokenizers.load(out)
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    tokens = [t for d in documents for t in [*tokenizer.encode(d), tokenizer.eos_id]]
    assert [r["tokens"] for r in results] == [len(tokens)] * 2
    model = inference.load(out)
    chunks = [torch.tensor([tokens[i : i + 32]]) for i in range(0, len(tokens), 32)]
    total = sum(float(model.nll(chunk).double().sum()) for chunk in chunks)
    assert results[0]["nll"] == pytest.approx(total / len(tokens), rel=1e-5)
    assert results[0]["bits_per_byte"] == pytest.approx(
        total / 0.6931471805599453 / sum(len(d.encode()) for d in documents), rel=1e-5
    )
    assert results[0]["sha256"] in score.stdout
    alone = command("tools/eval_zeroshot.py", out, "--text", text, "--json")
    assert json.loads(alone.stdout)["results"][0] == results[0]


def test_infilling_from_the_command_line(finished):
    """Gaps are filled, what is around them stays, and a way of decoding that cannot be is one line."""
    _, run, _ = finished
    model = run / "export"
    for ways in (["--streams", 2], ["--order", "random", "--draft", 3]):
        result = command("tools/generate.py", model, "--infill", "word ___:3 number ___ text", "--seed", 1, *ways)
        assert result.returncode == 0, result.stderr
        assert re.fullmatch(r"word .* number .* text\n", result.stdout, flags=re.DOTALL), result.stdout
        assert re.search(r"4 tokens in \d+ forward passes \(\d\.\d\d a pass\)", result.stderr)
    for words, line in (
        (["--infill", "no gap"], "--infill has no gap"),
        (["--infill", "___ ___", "--order", "random", "--streams", 2], "streams"),
        (["--device", "cuda:9"], "cuda:9 is not available"),
    ):
        refused(command("tools/generate.py", model, *words), line)


def test_back_to_training(finished, tmp_path):
    """A model directory begins a run: its weights bit for bit, its loss at the first step, and training goes on."""
    config, run, _ = finished
    model, begun = run / "export", tmp_path / "r"
    same = f"data.tokenizer={model}", f"data.directory={run}/data"
    words = "tools/convert_ckpt.py", model, begun, "--to-training", "--config", config
    refused(command(*words), "set data.tokenizer=")
    result = command(*words, *same)
    assert result.returncode == 0, result.stderr
    for change, line in (((), "already has checkpoints"), (["model.layers=6"], "has layers = 6")):
        with pytest.raises(UserError, match=line):
            export.to_training(model, config_files.load(config, [f"run_dir={begun}", *same, *change]))
    steps = "orders.ar_steps=0", "train.steps=4", "orders.permutation_steps=0", "orders.strided_steps=0", "orders.rho=0"
    launched = command(
        "launchers/slurm.py", "--config", config, "--cluster", "local", "--only", "train", f"run_dir={begun}", *same,
        *steps, "train.log_every=1", "train.checkpoint_every=4",
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    first = next(r["loss"] for r in RunDirectory(begun).metrics() if "loss" in r)
    fresh, *_, last = (r["loss"] for r in RunDirectory(run).metrics() if "loss" in r)
    assert abs(first - last) < 0.3 * abs(fresh - last)
    assert (begun / "checkpoints/step-00000004").is_dir()
    source, back = begun / "checkpoints/step-00000000", tmp_path / "back"
    result = command("tools/convert_ckpt.py", begun, back, "--checkpoint", source)
    assert result.returncode == 0, result.stderr
    assert (back / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_bad_runs_are_one_line(finished, tmp_path, text):
    config, run, _ = finished
    values = yaml.safe_load(config.read_text())

    def launch(*overrides, **changes):
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump({**values, "run_dir": str(tmp_path / "bad"), **changes}))
        return command("launchers/slurm.py", "--config", path, "--cluster", "local", *overrides)

    refused(command("launchers/slurm.py", "--config", tmp_path / "no.yaml"), "no.yaml")
    refused(launch("model.layer=3"), "did you mean 'model.layers'")
    refused(launch("parallel.tensor=3"), "2 processes .* parallel.tensor = 3")
    refused(launch("report.prompt=" + "word " * 60), r"report.prompt has \d+ tokens")
    refused(launch("optimizer.lr=1e30"), "lower optimizer.lr")
    shutil.rmtree(tmp_path / "bad")
    refused(launch("cluster.nodes=2"), "set cluster.nodes=1")
    refused(launch("data.text=[/nowhere/*.txt]"), "/nowhere")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(launch(f"data.text=[{empty}]"), "empty|trained|0 tokens")
    refused(launch(f"run_dir={run}", "model.layers=3"), "another .model.")
    file = tmp_path / "file"
    file.write_text("")
    refused(launch(f"run_dir={file}/run"), "cannot be written")
    assert not list(tmp_path.glob("bad/checkpoints/*"))


def test_bad_checkpoints_and_exports_are_one_line(finished, tmp_path):
    _, run, _ = finished
    refused(command("tools/convert_ckpt.py", tmp_path, tmp_path / "out"), "is not a run directory")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.copytree(run / "export", tmp_path / "model")
    part = next((copy / "checkpoints/step-00000008").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-100])
    refused(command("tools/convert_ckpt.py", copy, tmp_path / "model"), rf"{part.name} has \d+ bytes")
    # what was there is untouched
    assert inference.load(tmp_path / "model").config.vocab_size > 0
    again = copy / "config.yaml"
    older = command(
        "tools/convert_ckpt.py", copy, tmp_path / "model", "--checkpoint", copy / "checkpoints/step-00000006"
    )
    assert older.returncode == 0, older.stderr
    shutil.rmtree(copy / "checkpoints")
    refused(command("tools/convert_ckpt.py", copy, tmp_path / "model"), "no complete checkpoint")
    (tmp_path / "model/model.safetensors").unlink()
    for tool in (
        ["tools/generate.py", tmp_path / "model"],
        ["tools/eval_zeroshot.py", tmp_path / "model", "--text", again],
    ):
        result = command(*tool)
        if "--text" in tool:
            refused(result, "is not a model directory|no known format")
        else:
            refused(result, "model.safetensors is missing")
    full = tmp_path / "other"
    shutil.copytree(run / "export", full)
    refused(command("tools/generate.py", full, "--prompt", "word " * 200), r"prompt has \d+ tokens")
    refused(command("tools/generate.py", full, "--length", 999), "up to 32")
    refused(command("tools/generate.py", full, "--streams", 0), "streams must be")
    refused(command("tools/generate.py", full, "--device", "cuda", CUDA_VISIBLE_DEVICES=""), "cuda is not available")
    refused(command("tools/generate.py", full, "--device", "abacus"), "abacus is not available")
    refused(
        command("tools/eval_zeroshot.py", full, "--text", again, "--json", "/nowhere/x.json"),
        "there is no directory /nowhere",
    )
    refused(command("tools/eval_zeroshot.py", full, "--text", tmp_path / "no.txt"), "no.txt")
    refused(command("tools/eval_zeroshot.py", full, "--text", again, "--order", "zigzag"), "unknown order 'zigzag'")
    weights = full / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    refused(command("tools/generate.py", full), "cannot be read")
    (full / "config.json").write_text("{}")
    refused(command("tools/generate.py", full), "config.json")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("keep")
    refused(command("tools/convert_ckpt.py", run, tmp_path / "precious"), "choose another output directory")
    assert (tmp_path / "precious/file").read_text() == "keep"


def test_a_killed_rank_and_a_killed_launcher(finished, tmp_path):
    """kill -9 of one of two processes: the job starts again by itself; of the launcher: its jobs can be ended, and the
    same command goes on. The losses are the undisturbed ones.
    """
    config, _run, _ = finished
    words, process = _under_way(config, tmp_path, 6, steps=60, checkpoint_every=10, eval_every=1000)
    run = tmp_path / "run"
    victims = _running("submitit.core._submit", tmp_path)
    assert len(victims) >= 2
    refused(command(*words[1:]), "another process works on")
    before = {r["step"]: r["loss"] for r in RunDirectory(run).metrics()}
    os.kill(max(victims), signal.SIGKILL)
    deadline = time.monotonic() + 120
    while (
        max((r["step"] for r in RunDirectory(run).metrics()), default=0) < max(before) + 8
        and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    deaths = RunDirectory(run).restarts()
    assert [death["decision"] for death in deaths] == ["starts again after 0 s"]
    assert f"train at step {deaths[0]['reached']}" in command("launchers/slurm.py", "status", run).stdout
    process.kill()
    process.wait()
    refused(command(*words[1:]), "armd cancel")
    assert command("launchers/slurm.py", "cancel", run).stdout == "ended: train\n"
    while _running("submitit", tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert max(r["step"] for r in RunDirectory(run).metrics()) < 60
    again = command(*words[1:], "--only", "train")
    assert again.returncode == 0, again.stderr
    after = {r["step"]: r["loss"] for r in RunDirectory(run).metrics() if "loss" in r}
    assert sorted(after) == list(range(1, 63))
    assert {step: after[step] for step in before} == before


SCRIPT = """#!/bin/bash

# Parameters
#SBATCH --account=mine
#SBATCH --cpus-per-task=8
#SBATCH --error=RUN/jobs/train/%j/%j_0_log.err
#SBATCH --gpus-per-node=8
#SBATCH --job-name=big-train
#SBATCH --mem=900GB
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=RUN/jobs/train/%j/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --signal=USR2@240
#SBATCH --time=600
#SBATCH --wckey=submitit

# setup
module load cuda
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export PYTHONUTF8=1
export TOKENIZERS_PARALLELISM=false
export NCCL_DEBUG=INFO
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export OMP_NUM_THREADS=8
export PYTHONPATH=CODE:/extra

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output RUN/jobs/train/%j/%j_%t_log.out --error RUN/jobs/train/%j/%j_%t_log.err \
--kill-on-bad-exit=1 apptainer exec --nv image.sif python -u -m submitit.core._submit RUN/jobs/train/%j


# teardown
code=$?
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
[ $code -eq 0 ] || { apptainer exec --nv image.sif python -m launchers.restart RUN train ${job:-$SLURM_JOB_ID} $code \
&& exec bash "$0"; }
exit $code
"""


def test_the_script_for_slurm(tmp_path):
    """The whole text, with every kind of setting; on a machine without Slurm."""
    cluster = {
        "nodes": 4, "tasks_per_node": 8, "gpus_per_node": 8, "cpus_per_task": 8, "memory_gb": 900, "partition": "gpu",
        "account": "mine", "timeout_minutes": 600, "warn_seconds": 240, "setup": ["module load cuda"],
        "python": "apptainer exec --nv image.sif python", "sbatch": {"qos": "high"},
        "environment": {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/extra"},
    }  # fmt: skip
    config = RunConfig.model_validate({"name": "big", "run_dir": str(tmp_path), "cluster": cluster})
    text = jobs.sbatch_text(config, jobs.JobSpec("train", "train"), Path("CODE"))
    assert text.replace(str(tmp_path), "RUN").strip() == SCRIPT.replace("\\\n", "").strip()
    array = jobs.sbatch_text(config, jobs.JobSpec("tokenise-tokenise", "tokenise", 5), Path("CODE"))
    assert "#SBATCH --array=0-4%5" in array
    assert "gpus" not in array


def test_what_dies_again_and_again_is_given_up(tmp_path):
    """A job that fails three times at the same step, or too often without a new checkpoint, does not restart."""
    config = RunConfig.model_validate(
        {"run_dir": str(tmp_path), "cluster": {"max_restarts": 4, "backoff_seconds": 2.0}}
    )
    job = tmp_path / "jobs/train/1"
    job.mkdir(parents=True)

    def dies(step, permanent=False):
        fields = {"line": "out of luck", "bad_input": False, "permanent": permanent, "reached": step}
        RunDirectory.error_path(job).write_text(json.dumps(fields))
        return restart.decide(config, "train", "1", 1)[:2]

    assert dies(7) == (2.0, "out of luck")
    assert dies(7) == (4.0, "out of luck")
    assert dies(7) == (None, "failed 3 times at step 7: out of luck")
    assert dies(7) == (2.0, "out of luck"), "started by hand, it counts anew"
    assert [dies(step)[0] for step in (8, 9, 10)] == [4.0, 8.0, 16.0]
    assert dies(11) == (None, "failed 5 times without a new checkpoint: out of luck")
    assert dies(12)[0] == 2.0
    checkpoint = tmp_path / "checkpoints/step-00000012"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"step": 12, "files": {}, "state": {}, "states": []}')
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    assert dies(13)[0] == 2.0, "a new checkpoint is progress"
    assert dies(14, permanent=True) == (None, "out of luck")
    restart.clear(config, "train", "1")
    assert not RunDirectory.error_path(job).exists()
    assert restart.decide(config, "train", "1", 137) == (
        2.0,
        "a process died without an error message (exit code 137)",
        True,
    )


def test_an_interrupted_launcher_ends_its_jobs(finished, tmp_path):
    """Ctrl-C in a terminal, which reaches all processes, while a rank hangs; once more for the impatient."""
    config, _, _ = finished
    _, process = _under_way(config, tmp_path, 3, steps=5000, checkpoint_every=1000, eval_every=5000)
    os.kill(max(_running("submitit.core._submit", tmp_path)), signal.SIGSTOP)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.3)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)  # the second signal can find Python at its end
    assert not _running("submitit", tmp_path)
    assert not RunDirectory(tmp_path / "run").rendezvous_paths()


def _under_way(config, folder, records, **train):
    """Launch a longer run of ``config`` in ``folder`` and wait for its first records; its command and its process."""
    values = yaml.safe_load(config.read_text())
    values["run_dir"] = str(folder / "run")
    values["train"] |= train
    path = folder / "long.yaml"
    path.write_text(yaml.safe_dump(values))
    words = [sys.executable, "launchers/slurm.py", "--config", str(path), "--cluster", "local"]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(RunDirectory(folder / "run").metrics()) < records and time.monotonic() < deadline:
        time.sleep(0.2)
    return words, process


def _running(word, folder):
    """Numbers of the processes whose command line holds both."""
    paths = Path("/proc").glob("[0-9]*")
    return [int(p.name) for p in paths if word.encode() in _cmdline(p) and str(folder).encode() in _cmdline(p)]


def _cmdline(path):
    try:
        return (path / "cmdline").read_bytes()
    except OSError:
        return b""
