"""Everything that is asked of one GPU in one command: what is installed, correctness, timings beside their targets.

python tools/gpu.py --json gpu.json          # on a machine with one H100: about 10 minutes
python tools/gpu.py --device cpu --quick     # the same steps at toy sizes, to try the tool itself
python tools/gpu.py --wheels wheels          # on a machine without a network: first installs the wheels of a folder

Correctness comes first: training losses in every kind of order, of every objective, against the float64 standalone
model; gradients and generated texts against those of the CPU; two processes on the one GPU, over gloo, against one on
the CPU. Then whether a step waits for the GPU, and the attention kernels. Timings are those of ``tools/bench.py``.
"""

import argparse
import copy
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armd_scale.errors import UserError, cli
from armd_scale.files import check_writable, write_atomically

SMALL = {"layers": 12, "hidden": 768, "length": 1024, "batch": 16}
LARGE = {"layers": 22, "hidden": 2048, "length": 2048, "batch": 8}
QUICK = {"layers": 2, "hidden": 64, "length": 64, "batch": 2}
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}
"""Largest difference of a token's NLL to float64, in nats, with weights of unit scale."""
GRADIENTS = {"float32": 2e-3, "bfloat16": 0.1}
"""Largest relative difference of the gradient of a weight to that of float32 on the CPU."""
_INSTALLED = "ARMD_SCALE_WHEELS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--wheels", type=Path, help="folder of packages to install first, beside those that are there")
    parser.add_argument(
        "--reference", type=Path, help="instead: write what a GPU is compared with, computed on the CPU"
    )
    parser.add_argument("--trace", type=Path, help="folder for profiles of training steps")
    parser.add_argument("--json", type=Path, help="write all figures to this file as well")
    args = parser.parse_args()

    if args.wheels and _INSTALLED not in os.environ:
        _install(args.wheels)
    if args.reference:
        torch.save({"passes": _passes("cpu", "float32"), "losses": _losses_of_layout(1, "cpu")}, args.reference)
        return
    if args.json:
        check_writable(args.json)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here: --device cpu --quick tries the tool without one")
    try:
        for name in ("transformers", "armd_scale.inference", "armd_scale.training.loop"):
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install -c constraints.txt -e '.[bench]', or see --wheels"
        ) from error
    facts: dict[str, Any] = {"environment": _environment(args.device)}
    print(", ".join(f"{name} {value}" for name, value in facts["environment"].items()))
    dtypes = ["float32", "bfloat16"] if args.device == "cuda" else ["float32"]
    reference = _reference()
    facts["correctness"] = [row for dtype in dtypes for row in _correctness(args.device, dtype, reference["passes"])]
    facts["correctness"] += _two_processes(args.device, reference["losses"])
    print(f"\n{'correctness':<44}{'largest difference':>20}{'allowed':>10}")
    for row in facts["correctness"]:
        mark = "" if row["right"] else "   WRONG"
        print(f"  {row['what']:<42}{row['difference']:>20.1e}{row['allowed']:>10.0e}{mark}")
    facts["waits"] = _waits(args.device)
    print(f"\na training step, once it is under way, waits for the device: {facts['waits']}")
    wrong = [row["what"] for row in facts["correctness"] if not row["right"]]
    if wrong:
        raise UserError(f"results on {args.device} are wrong ({', '.join(wrong)}): no timing is worth taking")
    facts["attention"] = _attention(args.device, args.quick)
    facts["timings"] = _timings(args.device, args.quick, args.trace)
    facts["targets"] = _targets(facts["timings"])
    print(f"\n{'':<58}{'target':>10}{'measured':>12}")
    for row in facts["targets"]:
        verdict = "" if args.quick else "met" if row["met"] else "missed"
        print(f"  {row['what']:<56}{row['sign']} {row['target']:<8g}{row['measured']:>12.3f}   {verdict}")
    if args.json:
        write_atomically(args.json, json.dumps(facts, indent=1) + "\n")


def _install(wheels: Path) -> None:
    """Install the wheels of a folder beside what is there, and begin anew with them."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise UserError(f"there are no wheels in {wheels}")
    site = tempfile.mkdtemp(prefix="armd-scale-")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", site]
    if subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=False).returncode:
        raise UserError(f"the wheels in {wheels} could not be installed: see above")
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONPATH": path, _INSTALLED: site})


def _environment(device: str) -> dict[str, str]:
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in ("deepspeed", "megatron-core", "transformers"):
        found[name] = importlib.metadata.version(name)
    found["TransformerEngine"] = "yes" if importlib.util.find_spec("transformer_engine") else "no"
    if device == "cuda":
        found |= {"GPU": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)}
    return found


def _place(device: str) -> torch.device:
    return torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")


def _reference() -> dict[str, Any]:
    """What ``--reference`` writes, of a process that sees no GPU: where one is, Megatron-Core and DeepSpeed use it."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--reference", f"{folder}/reference.pt"]
        if subprocess.run(words, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=False).returncode:
            raise UserError("the reference could not be computed on the CPU: see above")
        return torch.load(f"{folder}/reference.pt")


def _cases() -> Iterator[tuple[str, str, Any, Any]]:
    """Objective, kind of order, layout and rows of everything that is compared."""
    from armd_scale import orders
    from armd_scale.model.rows import arrange, corrupt

    natural, tokens = orders.left_to_right(256), _tokens()
    layouts = {"left to right": natural, "any order": orders.shuffled(256, 256, 1)}
    layouts |= {f"strided, S = {s}": orders.strided(256, s) for s in (2, 4, 8)}
    for name, layout in layouts.items():
        yield "armd", f" {name}", layout, arrange(tokens, layout, 0)
    yield "ar", "", natural, arrange(tokens, natural, 0)
    yield "mdm", "", natural, corrupt(tokens, _masked(), np.ones(2), 1000)


def _tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, (2, 256))


def _masked() -> np.ndarray:
    return np.random.default_rng(1).random((2, 256)) < 0.5


@torch.enable_grad()
def _passes(device: str, dtype: str) -> dict[str, Any]:
    """Losses and gradients of the training network on the device, in a process group of one; and its weights."""
    from armd_scale.config import ModelConfig, ParallelConfig
    from armd_scale.model.network import Stage
    from armd_scale.parallel import groups
    from armd_scale.parallel.sharding import initialise

    place = _place(device)
    found: dict[str, Any] = {}
    stages: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        groups.start(ParallelConfig(), rank=0, processes=1, rendezvous=f"{folder}/store", device=place)
        for objective, kind, _, rows in _cases():
            if objective not in stages:
                model = ModelConfig(
                    objective=objective, layers=4, hidden=256, heads=4, length=256, vocab_size=1000, bos_id=0,
                    init_std=0.05,
                )  # fmt: skip
                stage = Stage(model, groups.transformer_config(model, ParallelConfig(), getattr(torch, dtype)))
                initialise([stage], model, 0)
                stages[objective] = stage.to(place)
                weights = {name: weight.detach().double().cpu() for name, weight in stage.named_parameters()}
                found[f"network, {objective}"] = {"model": model.model_dump(), "weights": weights}
            stage = stages[objective]
            stage.zero_grad()
            losses = stage(rows.to(place))
            losses.mean().backward()
            gradients = {name: weight.grad.float().cpu() for name, weight in stage.named_parameters()}
            found[objective + kind] = {"losses": losses.detach().double().cpu(), "gradients": gradients}
        groups.stop()
    return found


@torch.no_grad()
def _correctness(device: str, dtype: str, reference: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses on the device against the float64 model, gradients against those of the CPU, texts against the CPU's."""
    from armd_scale import inference
    from armd_scale.config import ModelConfig
    from armd_scale.training.export import standalone_config

    found, rows, models = _passes(device, dtype), [], {}
    place = _place(device)

    def compare(what: str, difference: float, allowed: float) -> None:
        rows.append({"what": what, "difference": difference, "allowed": allowed, "right": difference < allowed})

    for objective, kind, layout, batch in _cases():
        if objective not in models:
            model = ModelConfig.model_validate({**found[f"network, {objective}"]["model"], "objective": objective})
            models[objective] = inference.ARMD(standalone_config(model, eos_id=1)).double()
            weights = dict(found[f"network, {objective}"]["weights"])
            weights["embedding.weight"] = weights["embedding.weight"][: model.symbols]
            models[objective].load_state_dict(weights)
        standalone = models[objective]
        if objective == "mdm":
            logp = standalone.predict(standalone.denoise(batch.context_tokens)).log_softmax(-1)
            expected = -logp.gather(-1, torch.from_numpy(_tokens())[..., None])[..., 0] * torch.from_numpy(_masked())
        else:
            order, blocks = (torch.from_numpy(np.array(field)) for field in layout)
            expected = standalone.nll(torch.from_numpy(_tokens()), order, blocks)[:, order - 1]
        name = objective + kind
        compare(f"loss, {name}, {dtype}", float((found[name]["losses"] - expected).abs().max()), TOLERANCE[dtype])
        pairs = ((found[name]["gradients"][key], value) for key, value in reference[name]["gradients"].items())
        difference = max(float((one - other).norm() / other.norm()) for one, other in pairs)
        compare(f"gradients, {name}, {dtype}", difference, GRADIENTS[dtype])
    if dtype == "float32":
        rows += [_texts(models[objective], objective, place) for objective in ("armd", "ar")]
    return rows


def _texts(model: Any, objective: str, place: Any) -> dict[str, Any]:
    """Greedy texts of float64 models on the device and on the CPU: the share of tokens that differ."""
    from armd_scale.inference import Decoding

    decoding = Decoding(temperature=0, streams=4 if objective == "armd" else 1)
    here = model.generate(batch=3, length=64, decoding=decoding)
    there = copy.deepcopy(model).to(place).generate(batch=3, length=64, decoding=decoding).cpu()
    share = float((here != there).double().mean())
    return {"what": f"texts, {objective}, float64", "difference": share, "allowed": 0.01, "right": share <= 0.01}


def _toy_run(processes: int, **parallel: int) -> Any:
    """A small run in float32; a learned table, because gloo gathers nothing of a GPU."""
    from armd_scale.config import RunConfig

    shape = {"layers": 4, "hidden": 128, "heads": 4, "length": 64, "vocab_size": 500, "bos_id": 0, "init_std": 0.05}
    return RunConfig.model_validate(
        {
            "model": {**shape, "prefix": {"kernel": "learned"}},
            "orders": {"ar_steps": 0, "permutation_steps": 1, "rho": 32, "strided_steps": 2, "streams": [4]},
            "optimizer": {"warmup_steps": 0, "lr": 1e-3},
            "train": {"steps": 2, "global_batch": 8, "micro_batch": 2, "dtype": "float32"},
            "parallel": {"zero": 0, **parallel},
            "cluster": {"tasks_per_node": processes},
        }
    )


def _losses(rank: int, device: str, run: Any, folder: str) -> None:
    """Losses of a few steps of a rank, base training and strided, into a file."""
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine
    from armd_scale.training import objectives

    place, count = _place(device), run.cluster.processes
    groups.start(run.parallel, rank=rank, processes=count, rendezvous=f"{folder}/store", device=place, backend="gloo")
    engine, losses = Engine(run, place), []
    for step in range(run.total_steps):
        tokens = np.random.default_rng(step).integers(0, 500, (8, 64))
        share = 8 // run.data_parallel
        first = engine.data_rank * share
        slots = [range(start, start + 2) for start in range(first, first + share, 2)]
        rows = [objectives.training_rows(run, tokens[slot.start : slot.stop], step, slot) for slot in slots]
        losses.append(engine.train_step(engine.upload(rows), 1e-3).result().loss)
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    groups.stop()


def _losses_of_layout(processes: int, device: str, **parallel: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        run = _toy_run(processes, **parallel)
        torch.multiprocessing.spawn(_losses, (device, run, folder), nprocs=processes)
        return json.loads(Path(folder, "losses.json").read_text(encoding="utf-8"))


def _two_processes(device: str, reference: list[float]) -> list[dict[str, Any]]:
    """Data and tensor parallelism of two processes on the device against one process on the CPU, over gloo."""
    rows = []
    layouts: dict[str, dict[str, int]] = {"data 2": {}, "tensor 2": {"tensor": 2}}
    for name, parallel in layouts.items():
        losses = _losses_of_layout(2, device, **parallel)
        difference = float(np.abs(np.subtract(losses, reference)).max())
        what = f"losses of four steps, {name}, on one device"
        rows.append({"what": what, "difference": difference, "allowed": 2e-3, "right": difference < 2e-3})
    return rows


def _waits(device: str) -> str:
    """Whether a step of the training engine makes the host wait for the GPU."""
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine
    from armd_scale.training import objectives

    if device == "cpu":
        return "there is no GPU"
    run = _toy_run(1, zero=1)
    run = run.model_copy(update={"train": run.train.model_copy(update={"dtype": "bfloat16"})})
    place, answer = _place(device), "no"
    with tempfile.TemporaryDirectory() as folder:
        groups.start(run.parallel, rank=0, processes=1, rendezvous=f"{folder}/store", device=place)
        engine = Engine(run, place)
        tokens = np.random.default_rng(0).integers(0, 500, (8, 64))
        for step in (0, run.total_steps - 1):  # base training and strided
            rows = engine.upload([objectives.training_rows(run, tokens, step, range(8))])
            for _ in range(3):
                engine.train_step(rows, 1e-3).result()
            torch.cuda.set_sync_debug_mode("error")
            try:
                pending = engine.train_step(rows, 1e-3)
            except RuntimeError as error:
                answer = f"yes ({str(error).splitlines()[0]})"
                break
            finally:
                torch.cuda.set_sync_debug_mode("default")
            pending.result()
        groups.stop()
    return answer


def _attention(device: str, quick: bool) -> list[dict[str, Any]]:
    """Milliseconds of attention, forward and backward, by every kernel that runs here."""
    from armd_scale.model import attention

    place, dtype = _place(device), torch.bfloat16 if device == "cuda" else torch.float32
    rows = []
    print("\nattention, forward and backward, ms")
    for size in [QUICK] if quick else [SMALL, LARGE]:
        heads = size["hidden"] // 64
        for streams in (1, 2):
            shape = (streams, size["batch"], heads, 1, size["length"], 64)
            table = attention.measure(shape, dtype, place)
            rows.append({"shape": shape, "seconds": table})
            found = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in table.items())
            print(f"  {streams} streams, {size['batch']} x {heads} heads x {size['length']}: {found}")
    return rows


def _timings(device: str, quick: bool, trace: Path | None) -> dict[str, Any]:
    """Figures of ``tools/bench.py``: training at two sizes, decoding."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    where = ["--device", device, "--dtype", dtype]
    small, large = (QUICK, QUICK) if quick else (SMALL, LARGE)
    modern = ["--norm", "rmsnorm", "--mlp", "swiglu"]
    steps = ["--steps", "2"] if quick else []
    less = ["--vocab", "1000", "--threads", "1"] if quick else []
    seen = ["--trace", str(trace)] if trace else []
    out = {
        "train small": _bench("train", *where, *_options(small), *less, *steps, *seen),
        "train large": _bench("train", *where, *_options(large), *modern, *less, *steps, *seen),
    }
    shape = _options({name: small[name] for name in ("layers", "hidden", "length")})
    batches = ["--batch", "1", "2" if quick else "64", "--streams", "1", "4"]
    return out | {"decode": _bench("decode", *where, *shape, *batches, *less)}


def _options(sizes: dict[str, int]) -> list[str]:
    return [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


def _bench(*words: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        tool = Path(__file__).with_name("bench.py")
        print(f"\nbench.py {' '.join(words)}", flush=True)
        done = subprocess.run([sys.executable, str(tool), *words, "--json", str(out)], env=os.environ, check=False)
        if done.returncode:
            raise UserError(f"bench.py {words[0]} failed: see above")
        return json.loads(out.read_text(encoding="utf-8"))


def _targets(timings: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of docs/performance.md."""
    small, large = ({row["kind"]: row for row in timings[f"train {size}"]["rows"]} for size in ("small", "large"))
    limit = timings["train large"]["limit"]
    peak = limit["peak"] or limit["flops"]
    decode = timings["decode"]
    one, many = (rows for name, rows in decode.items() if name.startswith("batch "))

    def mfu(row: dict[str, float]) -> float:
        return row["flops"] / row["seconds"] / peak

    def texts(rows: dict[str, Any], streams: int) -> dict[str, float]:
        return rows[f"armd_scale S = {streams}"]

    faster = texts(many, 4)["tokens_per_second"] / many["transformers GPT-2"]["tokens_per_second"]
    table = [
        ("ARMD / AR step time, 125M, 1024 tokens", "<=", 1.20, small["ARMD"]["ratio"]),
        ("MFU, 1B-class ARMD, 2048 tokens", ">=", 0.50, mfu(large["ARMD"])),
        ("MFU, AR on this stack, the same size", ">=", 0.52, mfu(large["AR"])),
        (
            "strided fine-tuning step (S = 4) / plain step",
            "<=",
            1.15,
            small["ARMD, strided, S = 4"]["seconds"] / small["ARMD"]["seconds"],
        ),
        ("one sequence of 1024, 125M, batch 1, S = 1, seconds", "<=", 0.40, texts(one, 1)["seconds"]),
        ("the same, S = 4", "<=", 0.11, texts(one, 4)["seconds"]),
        ("tokens/s, batch 64, S = 4, over transformers' GPT-2", ">=", 8.0, faster),
    ]
    planned = large["ARMD"]["planned"]
    if planned:  # of a GPU that the plan knows
        table.append(
            ("peak memory over plan, 1B-class, off by", "<=", 0.10, abs(large["ARMD"]["memory"] / planned - 1))
        )
    return [
        {"what": what, "sign": sign, "target": target, "measured": value,
         "met": value <= target if sign == "<=" else value >= target}
        for what, sign, target, value in table
    ]  # fmt: skip


if __name__ == "__main__":
    cli(main)
