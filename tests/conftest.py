"""Shared tools of the tests: small models, and real processes on gloo that start in a fraction of a second."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import dataclasses
import pickle
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import save_file

from armd_scale import inference, orders
from armd_scale.config import AdapterConfig, ModelConfig, ParallelConfig, PrefixConfig, RopeConfig
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.inference import ARMDConfig, folder
from armd_scale.orders import Layout
from launchers import cli

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("ci")

PAPER_SEED = {"gate": None, "neighbour": False, "place": "target"}
PAPER = ModelConfig(
    layers=4,
    hidden=32,
    heads=4,
    length=16,
    vocab_size=50,
    bos_id=1,
    prefix=PrefixConfig(dim=16, width=3.0, **PAPER_SEED),
    init_std=0.2,
)
MODERN = ModelConfig(
    layers=3,
    hidden=32,
    heads=4,
    kv_heads=2,
    length=16,
    vocab_size=50,
    bos_id=1,
    norm="rmsnorm",
    mlp="swiglu",
    ffn=48,
    two_stream_layers=2,
    tied_head=False,
    prefix=PrefixConfig(dim=16, width=2.0, kernel="sinusoid", scale="mean", target_position=True, **PAPER_SEED),
    init_std=0.2,
)
LEARNED = MODERN.model_copy(
    update={
        "two_stream_layers": 3,
        "target_mlp": False,
        "prefix": PrefixConfig(dim=8, width=2.0, kernel="learned", scale="sqrt", **PAPER_SEED),
    }
)
FEATURES = MODERN.model_copy(
    update={
        "qk_norm": True,
        "qkv_bias": True,
        "head_dim": 12,
        "rope": RopeConfig(scaling="yarn", factor=4.0, original_length=8, high_turns=2.0, low_turns=0.1),
        "prefix": PrefixConfig(dim=16, width=[1.0, 3.0], gate=0.5),
        "adapter": AdapterConfig(rank=3),
    }
)
"""Every feature that is off in the others."""
MODELS = {"paper": PAPER, "modern": MODERN, "learned": LEARNED, "features": FEATURES}
BASELINES = {
    "ar": PAPER.model_copy(update={"objective": "ar"}),
    "ar modern": MODERN.model_copy(update={"objective": "ar"}),
    "card": PAPER.model_copy(update={"objective": "card"}),
    "card modern": MODERN.model_copy(update={"objective": "card"}),
    "mdm": PAPER.model_copy(update={"objective": "mdm"}),
    "mdm modern": MODERN.model_copy(update={"objective": "mdm"}),
}


def standalone(config: ModelConfig, seed: int = 0) -> inference.ARMD:
    """A standalone float64 model with random weights of the shape of ``config``."""
    from armd_scale.training.export import standalone_config

    model = inference.ARMD(standalone_config(config, eos_id=2)).double().requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.copy_(1 + 0.1 * noise if name.endswith(("norm.weight", "_norm")) else 0.3 * noise)
    return model


def model_folder(place: Path, config: ModelConfig, tokenizer: Tokenizer) -> Path:
    """A whole model directory in ``place``, with random float32 weights."""
    model = standalone(config.model_copy(update={"vocab_size": tokenizer.vocab_size})).float()
    shape = dataclasses.replace(model.config, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    save_file(dict(model.state_dict()), place / "model.safetensors", metadata={"format": "pt"})
    tokenizers.copy(tokenizer, place)
    folder.write_config(place, shape, {})
    folder.write_code(place)
    words = (tokenizer.token(index) for index in (tokenizer.bos_id, tokenizer.eos_id))
    folder.write_tokenizer_settings(place, shape.length, *words)
    return place


def tiny_distribution(vocab: int, length: int, **changes: Any) -> inference.ARMD:
    """A model small enough to enumerate every sequence, with decided preferences."""
    config = ARMDConfig(
        vocab_size=vocab, bos_id=0, eos_id=0, layers=2, hidden=8, heads=2, kv_heads=2, ffn=16, length=length,
        two_stream_layers=1, norm="layernorm", mlp="gelu", tied_head=False, rope_base=100.0, norm_eps=1e-5,
        prefix_kernel="gaussian", prefix_width=2.0, prefix_dim=8, prefix_scale="none", prefix_target_position=False,
    )  # fmt: skip
    model = inference.ARMD(dataclasses.replace(config, **changes)).double().requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(7)
    for param in model.parameters():
        param.copy_(0.8 * torch.randn(param.shape, generator=generator, dtype=torch.float64))
    return model


def layouts(length: int) -> dict[str, Layout]:
    """The kinds of layout that everything must handle; the last block of some is ragged."""
    natural = orders.left_to_right(length)
    return {
        "left-to-right": natural,
        "shuffled": orders.shuffled(length, length // 2, 3),
        "random": orders.shuffled(length, length, 5),
        **{f"strided-{s}": orders.strided(length, s) for s in (1, 2, 4, 8)},
        "random-blocks": Layout(orders.shuffled(length, length, 6).order, np.arange(length) // 3 + 1),
        "one-block": Layout(natural.order, np.ones(length, dtype=np.int64)),
    }


def pytest_addoption(parser):
    parser.addoption("--parity", action="store_true", help="every layout with every model, see make parity")


def pytest_collection_modifyitems(items):
    """The modules that take minutes go first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.path.parent.name not in ("launchers", "training"))


@pytest.fixture(scope="session", autouse=True)
def no_groups_in_the_parent():
    """Gloo's threads, once started in this process, are missing in every process forked later, which then hangs."""
    parent, start = os.getpid(), torch.distributed.init_process_group

    def start_in_a_child(backend, **kwargs):
        assert backend == "fake" or os.getpid() != parent, "start groups in forked processes: run_tool, run_processes"
        return start(backend, **kwargs)

    torch.distributed.init_process_group = start_in_a_child
    yield
    torch.distributed.init_process_group = start


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test marked ``one_process`` in a forked process with Megatron-Core's groups of one."""
    if pyfuncitem.get_closest_marker("one_process") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    run_processes(1, _with_groups, pyfuncitem.obj, arguments)
    return True


def _with_groups(rank: int, count: int, rendezvous: Path, test: Callable[..., None], arguments: dict[str, Any]) -> None:
    from armd_scale.parallel import groups

    groups.start(ParallelConfig(), rank=rank, processes=count, rendezvous=rendezvous, device=torch.device("cpu"))
    test(**arguments)
    groups.stop()


def run_processes(count: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``work(rank, count, rendezvous, *args)`` in ``count`` forked processes; their results by rank.

    Forking keeps the imports of this process, so a group of four starts in half a second.
    """
    from armd_scale.parallel import megatron_cpu

    megatron_cpu.install()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_call, (count, folder, work, args), nprocs=count, start_method="fork")
        results = [pickle.loads((Path(folder) / f"{rank}").read_bytes()) for rank in range(count)]
    return results


def run_tool(*words: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script, as from a shell, in a forked process: that saves the seconds of its imports."""
    argv = list(map(str, words))
    return _run_forked(argv, lambda: runpy.run_path(argv[0], run_name="__main__"), environment)


def run_armd(*words: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command ``armd`` in a forked process."""
    argv = ["armd", *map(str, words)]
    return _run_forked(argv, lambda: cli.main(argv[1:]), environment)


def _run_forked(
    argv: list[str], program: Callable[[], Any], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _be_a_program(argv, program, environment, out.fileno(), err.fileno())
        _, status = os.waitpid(pid, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(argv, os.waitstatus_to_exitcode(status), *texts)


def _be_a_program(argv: list[str], program: Callable[[], Any], environment: dict[str, str], out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, encoding="utf-8", closefd=False) for fd in (1, 2))  # noqa: SIM115
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = argv
    code: Any = 1
    try:
        program()
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _call(rank: int, count: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        result = work(rank, count, Path(folder) / "store", *args)
    except BaseException:
        traceback.print_exc()
        raise
    (Path(folder) / f"{rank}").write_bytes(pickle.dumps(result))


def shared_data(name: str) -> Path:
    """A file of the data that is kept beside the repository for experiments; skips the test where there is none."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"the data for experiments is not here ({name})")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small prepared data set of made-up prose, which tests do not change."""
    import json

    from data_pipeline import prepare
    from tests.runs import PANGRAMS, run

    folder = tmp_path_factory.mktemp("data")
    words = PANGRAMS.split()
    draw = np.random.default_rng(0)
    text = folder / "text.jsonl"
    lines = [json.dumps({"text": " ".join(draw.choice(words, 60)) + ".\n"}) for _ in range(200)]
    text.write_text("\n".join(lines))
    config = run(folder, text, folder / "unused")
    prepare.prepare(config)
    return folder
