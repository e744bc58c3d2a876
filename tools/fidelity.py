"""Run a study from one file and write its report page: what the paper claims, measured.

python tools/fidelity.py configs/fidelity/cpu.yaml --out DIR [--data BOOKS_DIR] [--suite DIR] [section.field=value ...]

Trains every run that is not finished (a study goes on where it was stopped), measures each, and writes
``DIR/page/README.md`` with its pictures and ``results.json``. ``--data`` holds ``train*`` and ``heldout*`` text files;
``--suite`` the zero-shot texts. Without ``--data`` the text is that of the study's run.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from armd_scale import config_syntax
from armd_scale.errors import UserError, cli
from armd_scale.files import exclusive

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="study file, see configs/fidelity/")
    parser.add_argument("--out", type=Path, required=True, help="directory of the study: runs, figures, page")
    parser.add_argument("--data", type=Path, help="directory with train* and heldout* texts")
    parser.add_argument("--suite", type=Path, help="directory with the zero-shot texts")
    parser.add_argument("--slots", type=int, help="runs side by side (default: those of the study)")
    parser.add_argument("--page-only", action="store_true", help="make the page of DIR/page/results.json anew")
    parser.add_argument("overrides", nargs="*", help="section.field=value, for every run")
    args = parser.parse_args()
    from armd_scale.evaluation import study as studies
    from armd_scale.evaluation import study_page

    study, page = studies.load(args.study), args.out / "page"
    if args.page_only:
        if not (page / "results.json").is_file():
            raise UserError(f"there are no figures in {page}: run the study first")
        study_page.write(page, json.loads((page / "results.json").read_text(encoding="utf-8")))
        return
    if args.slots is not None:
        if args.slots < 1:
            raise UserError("--slots must be at least 1")
        study = study.model_copy(update={"slots": args.slots})
    args.out.mkdir(parents=True, exist_ok=True)
    with exclusive(args.out / ".lock", f"the study in {args.out}"):
        _run(study, args)


def _run(study: Any, args: argparse.Namespace) -> None:
    from armd_scale.evaluation import study as studies
    from armd_scale.evaluation import study_page
    from armd_scale.training.telemetry import environment
    from launchers.jobs import is_trained

    out, started = args.out.resolve(), time.time()
    shared = {**study.run, "data": {**study.run.get("data", {}), "directory": str(out / "data")}}
    if args.data:
        texts = {kind: sorted(map(str, args.data.resolve().glob(f"{kind}*"))) for kind in ("train", "heldout")}
        if not all(texts.values()):
            raise UserError(f"{args.data} must hold files train* and heldout*")
        shared["data"] |= {"text": texts["train"], "heldout_text": texts["heldout"]}
    (out / "run.yaml").write_text(config_syntax.write(shared), encoding="utf-8")
    if args.suite and not args.suite.is_dir():
        raise UserError(
            f"there is no directory {args.suite}: name the one with the zero-shot texts, or leave out --suite"
        )
    every = studies.runs(study)
    run_configs = {run: study.config(run, out, args.overrides) for run in every}  # a wrong override ends the study here
    equal = study.equal_steps(run_configs)
    for config in run_configs.values():
        _check_begun(config)
    command = f"python tools/fidelity.py {' '.join(sys.argv[1:])}"
    _launch(study, every[0], out, args.overrides, "tokenise")
    # Long runs first, so that they do not run alone at the end.
    waiting = sorted(
        (run for run in every if not is_trained(run_configs[run])),
        key=lambda run: -run_configs[run].total_steps * _cost(run_configs[run]),
    )
    print(f"{study.name}: {len(every)} runs, {len(waiting)} to train, {study.slots} at a time", flush=True)
    with concurrent.futures.ThreadPoolExecutor(study.slots) as pool:
        jobs = {pool.submit(_launch, study, run, out, args.overrides, "train"): run for run in waiting}
        try:
            for number, job in enumerate(concurrent.futures.as_completed(jobs), start=1):
                job.result()
                print(f"  {number}/{len(jobs)} {jobs[job].name}, {(time.time() - started) / 60:.0f} min", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those that run end by themselves
            raise
    judge = next((run_configs[run].directory for run in every if run.variant == studies.JUDGE), None)
    where = environment()
    results: dict[str, Any] = {
        "name": study.name,
        "command": command,
        "commit": where["git_commit"] or "not a git checkout",
        "equal_steps": equal,
        "environment": where,
        "study": study.model_dump(),
        "runs": {},
    }
    with concurrent.futures.ProcessPoolExecutor(study.slots, multiprocessing.get_context("spawn")) as workers:
        asked = {
            run: workers.submit(studies.measure, study, run, run_configs[run].directory, equal, judge, args.suite)
            for run in every
        }
        for run, answer in asked.items():
            results["runs"].setdefault(run.variant, {})[str(run.seed)] = answer.result()
    results["minutes"] = (time.time() - started) / 60
    page = out / "page"
    page.mkdir(exist_ok=True)
    studies.write_results(page / "results.json", results)
    study_page.write(page, json.loads((page / "results.json").read_text(encoding="utf-8")))
    print(f"{page / 'README.md'}: {results['minutes']:.0f} minutes of work")


def _check_begun(config: Any) -> None:
    """``UserError`` when the directory of a run holds one with other settings."""
    from armd_scale import config_files

    path = config.run_directory.config_path
    if not path.is_file():
        return
    free = {"name", "run_dir", "cluster", "report"}
    before, now = (one.model_dump(exclude=free) for one in (config_files.load(path), config))
    changed = [name for name in now if before[name] != now[name]]
    if changed:
        raise UserError(
            f"{config.directory} was trained with another '{changed[0]}': remove it, or choose another --out"
        )


def _launch(study: Any, run: Any, out: Path, overrides: list[str], stage: str) -> None:
    """Run a stage of a run by the launcher; ``UserError`` when it fails."""
    words = [sys.executable, str(ROOT / "launchers" / "slurm.py"), "--config", str(out / "run.yaml")]
    words += ["--cluster", "local", "--only", stage, *overrides, *study.overrides(run, out)]
    log = out / "logs" / f"{run.name}-{stage}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(f"{run.name} could not be trained: {' '.join(last)} (all of it in {log})")


def _cost(config: Any) -> float:
    from armd_scale import config as configs
    from armd_scale.model.flops import training_flops_per_token

    return training_flops_per_token(configs.with_vocabulary(config, config.data.vocab_size, 1).model)


if __name__ == "__main__":
    cli(main)
