"""The command ``armd``: its help, its errors, and the scripts that stand for its sub-commands."""

import json
import os
import subprocess
import sys

import pytest

from launchers.cli import COMMANDS, GROUPS
from tests.conftest import ROOT, run_armd, run_tool

SCRIPTS = {
    "train": ["launchers/slurm.py"],
    "status": ["launchers/slurm.py", "status"],
    "logs": ["launchers/slurm.py", "logs"],
    "cancel": ["launchers/slurm.py", "cancel"],
    "plan": ["tools/plan.py"],
    "export": ["tools/convert_ckpt.py"],
    "import": ["tools/convert_ckpt.py", "--to-training"],
    "generate": ["tools/generate.py"],
    "serve": ["tools/serve.py"],
    "eval zeroshot": ["tools/eval_zeroshot.py"],
    "eval generation": ["tools/eval_generation.py"],
    "bench data": ["tools/bench.py", "data"],
    "bench decode": ["tools/bench.py", "decode"],
    "bench train": ["tools/bench.py", "train"],
    "bench gpu": ["tools/bench.py", "gpu"],
}
SLOW = ("torch", "pydantic", "yaml", "submitit", "matplotlib")


def test_help_lists_every_command():
    done = run_armd("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, command in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert command.summary in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    for group in GROUPS:
        done = run_armd(group, "--help")
        assert done.returncode == 0
        listed = [line for line in done.stdout.splitlines() if line.startswith("  ")]
        assert len(listed) == sum(name.startswith(f"{group} ") for name in COMMANDS)


@pytest.mark.parametrize("name", ["", *(name for name in COMMANDS if name != "eval harness")])
def test_help_imports_nothing_slow(name):
    code = (
        "import sys\n"
        "from launchers import cli\n"
        "try: cli.main([*sys.argv[1:], '--help'])\n"
        "except SystemExit as ended: assert not ended.code\n"
        f"print('imported:', *sorted(sys.modules.keys() & {set(SLOW)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *name.split()], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"usage: armd {name}")
    assert done.stdout.splitlines()[-1] == "imported:"


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "launchers.cli", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("armd_scale ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "there is no command 'trian': did you mean 'train'?"),
        (["zeroshot"], "there is no command 'zeroshot': did you mean 'eval zeroshot'?"),
        (["bench", "decod"], "there is no command 'bench decod': did you mean 'bench decode'?"),
        (["xyzzy"], "there is no command 'xyzzy': see armd --help"),
        (["bench", "xyzzy"], "there is no command 'bench xyzzy': see armd bench --help"),
    ],
)
def test_an_unknown_command(words, line):
    done = run_armd(*words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")


@pytest.mark.parametrize("words", [[], ["eval"], ["bench"]])
def test_a_missing_command(words):
    done = run_armd(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: armd ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train", "--config (see armd train --help)"),
        ("train --config none.yaml", "none.yaml"),
        ("train --config configs/tiny.yaml --cluster here", "invalid choice: 'here'"),
        ("status .", "is not a run directory"),
        ("logs .", "is not a run directory"),
        ("cancel .", "is not a run directory"),
        ("prepare --config none.yaml", "none.yaml"),
        ("prepare --config configs/tiny.yaml data.text=[/nowhere/*] run_dir={tmp}", "/nowhere/*"),
        ("inspect .", "is not complete prepared data"),
        ("plan --config configs/7b.yaml --plot x.png", "--plot needs --along"),
        ("plan --config configs/7b.yaml --vocab 0", "--vocab"),
        ("export . {tmp}/model", "is not a run directory"),
        ("export . {tmp}/model --file-gb 0", "--file-gb"),
        ("export . {tmp}/model --config x", "unrecognized arguments: --config"),
        ("import . {tmp}/run", "is not a model directory"),
        ("import tests/fixtures/v0.1/armd {tmp}/run", "--config"),
        ("import {tmp} {tmp}/run --config configs/tiny.yaml", "is not a model directory"),
        ("generate .", "is not a model directory"),
        ("serve . --port 70000", "--port"),
        ("eval zeroshot .", "--suite --text"),
        ("eval zeroshot . --suite zeroshot", "--suite needs --data"),
        ("eval generation . --samples 0", "--samples and --batch"),
        ("eval generation . --plot {tmp}/x.txt", ".png, .pdf, .svg"),
        ("bench data --json /nowhere/x.json", "/nowhere"),
        ("bench decode --hidden 65", "--hidden"),
        ("bench train --hidden 65", "--hidden"),
        ("bench gpu --wheels .", "tools/gpu.py"),
    ],
)
def test_bad_input_is_one_line(words, line, tmp_path):
    done = run_armd(*words.format(tmp=tmp_path).split())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert line in done.stderr


def test_a_foreign_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    done = run_armd("import", tmp_path, tmp_path / "run", "--config", "configs/tiny.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "architecture of 'gpt2': known are LlamaForCausalLM" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_and_command_print_the_same_help(name):
    command, script = run_armd(*name.split(), "--help"), run_tool(*SCRIPTS[name], "--help")
    assert command.returncode == script.returncode == 0
    assert command.stdout == script.stdout
    assert command.stdout.startswith(f"usage: armd {name} ")


def test_changes_go_anywhere(tmp_path):
    """Changes to the configuration may stand between options."""
    words = "--config", "configs/tiny.yaml", "model.layers=2", "--dry-run", "seed=5", "--only", "train"
    done = run_armd("train", *words, f"run_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert "  layers: 2\n" in done.stdout
    assert "\nseed: 5\n" in done.stdout
    assert not (tmp_path / "run").exists()


def test_prepare_and_inspect(tmp_path):
    """The data of a run without the run; again, it does nothing."""
    lines = [json.dumps({"text": f"Word number {n} of some text. " * 9}) for n in range(200)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    words = [
        "prepare", "--config", "configs/tiny.yaml", f"run_dir={tmp_path}/run", f"data.text=[{tmp_path}/text.jsonl]",
        "data.vocab_size=300", "data.heldout_fraction=0.3", "report.prompt=Word",
    ]  # fmt: skip
    first = run_armd(*words)
    assert first.returncode == 0, first.stderr
    assert "data: " in first.stdout
    assert first.stdout.splitlines()[-1].endswith("training samples of 128 tokens")
    assert run_armd(*words).stdout.splitlines() == first.stdout.splitlines()[-1:]
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name[0] != "."] == ["data"]
    done = run_armd("inspect", tmp_path / "run/data", "--samples", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("every shard has its size and SHA-256") == 2


def test_a_locale_without_utf8():
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "launchers.cli", "train", "--config", "\u00e9.yaml"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env={**os.environ, **settings})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "there is no configuration file \u00e9.yaml" in done.stderr
