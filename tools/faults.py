"""Injects faults into a run of four local processes, and prints a table of the outcomes.

python tools/faults.py [--faults 50] [--seed 0] [--json faults.json]

Faults: ranks and launchers are killed, stopped and sent SIGTERM, checkpoints and shards are damaged, the disk is filled
(on a tmpfs, as root), and gradients become NaN. At the end, every loss must equal the loss of an undisturbed run with
the same skipped steps, and every step must have used its samples. Exit code 1 otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from armd_scale.errors import UserError, cli
from armd_scale.files import write_atomically
from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest
from launchers import jobs

ROOT = Path(__file__).resolve().parents[1]
TMPFS_BYTES = 160 << 20

HOOK = '''
"""Makes a gradient NaN: in the next step on SIGUSR1, and in the steps that ARMD_NAN_STEPS lists."""
import os, signal

def arm(*_):
    from armd_scale.parallel import engine
    run = engine.Engine._run
    def once(self, micro_batches, loss, forward_only):
        out = run(self, micro_batches, loss, forward_only)
        if not forward_only:
            engine.Engine._run = run
            self.zero.gradient(next(self.stages.parameters())).view(-1)[0] = float("nan")
        return out
    engine.Engine._run = once

signal.signal(signal.SIGUSR1, arm)
steps = {int(step) for step in os.environ.get("ARMD_NAN_STEPS", "").split(",") if step}
if steps:
    import importlib.abc, sys
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "armd_scale.training.loop":
                sys.meta_path.remove(self)
                import armd_scale.training.loop as loop
                start = loop.schedules.learning_rate
                def rate(step, *rest):
                    if step + 1 in steps:
                        arm()
                    return start(step, *rest)
                loop.schedules.learning_rate = rate
            return None
    sys.meta_path.insert(0, Finder())
'''


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=50, help="number of faults (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults and moments")
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign = _Campaign(Path(folder), random.Random(args.seed), args.faults)
        try:
            failures = campaign.run()
        finally:
            campaign.close()
    if args.json:
        write_atomically(args.json, json.dumps(campaign.rows, indent=1) + "\n")
    print("\n" + ("\n".join(failures) if failures else "all losses and samples equal those of the undisturbed run"))
    return int(bool(failures))


class _Campaign:
    """The run under attack, and what has befallen it so far."""

    def __init__(self, folder: Path, draw: random.Random, count: int) -> None:
        self.folder, self.draw, self.count = folder, draw, count
        self.rows: list[dict[str, Any]] = []
        self.run_dir = RunDirectory(folder / "disk" / "run")
        self.run_dir.path.parent.mkdir()
        (folder / "hook").mkdir()
        (folder / "hook/sitecustomize.py").write_text(HOOK)
        self.tmpfs = (
            os.geteuid() == 0
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(self.run_dir.path.parent)],
                check=False,
            ).returncode
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.steps = 60 * count + 100
        _write_text(folder / "text.jsonl")

    def run(self) -> list[str]:
        """All faults, one after the other; what is wrong in the end."""
        kinds: dict[str, Callable[[], str]] = {
            "kill -9 a rank": self._kill_rank,
            "kill -9 all ranks": self._kill_all,
            "kill -9 the launcher": self._kill_launcher,
            "SIGSTOP a rank": self._stop_rank,
            "SIGTERM a rank": self._terminate,
            "truncate the newest checkpoint": lambda: self._damage_checkpoint(truncate=True),
            "flip a bit in the newest checkpoint": lambda: self._damage_checkpoint(truncate=False),
            "truncate a shard": lambda: self._damage_shard(truncate=True),
            "flip a bit in a shard": lambda: self._damage_shard(truncate=False),
            "a gradient becomes NaN": self._nan,
            **({"fill the disk": self._fill_disk} if self.tmpfs else {}),
        }
        order = [
            name for _ in range(-(-self.count // len(kinds))) for name in self.draw.sample(sorted(kinds), len(kinds))
        ]
        print(f"{'fault':<36} {'at step':>7} {'detected':>9} {'lost':>5} {'working again':>14}  outcome")
        self._launch()
        self._wait("the first checkpoint", lambda: self.run_dir.newest_checkpoint() is not None)
        for name in order[: self.count]:
            beyond = self._reached() + self.draw.randrange(3, 25)
            self._wait("progress", lambda beyond=beyond: self._reached() > beyond)  # type: ignore[misc]
            at, started = self._reached(), time.monotonic()
            outcome = kinds[name]()
            detected = self.noticed - started
            resumed = self._resumed_at() if self._output().count("processes: ") > self.starts else at
            self._wait("work after " + name, lambda at=at: self._reached() > at)
            row = {
                "fault": name, "step": at, "detected_seconds": round(detected, 1),
                "lost_steps": max(0, at - resumed), "recovered_seconds": round(time.monotonic() - started, 1),
                "outcome": outcome,
            }  # fmt: skip
            self.rows.append(row)
            print(
                f"{name:<36} {at:>7} {row['detected_seconds']:>7} s {row['lost_steps']:>5} "
                f"{row['recovered_seconds']:>12} s  {outcome}",
                flush=True,
            )
        self._end()
        return self._compare()

    def close(self) -> None:
        """End what still runs, and unmount."""
        self._end()
        if self.tmpfs:
            subprocess.run(["umount", "-l", str(self.run_dir.path.parent)], check=False)

    # --- the run

    def _config(self, run: RunDirectory, nan_steps: list[int] | None = None, steps: int | None = None) -> Path:
        hook = {"PYTHONPATH": str(self.folder / "hook")}
        if nan_steps:
            hook["ARMD_NAN_STEPS"] = ",".join(map(str, nan_steps))
        values = {
            "name": "faults",
            "run_dir": str(run.path),
            "model": {"layers": 2, "hidden": 32, "heads": 2, "length": 32},
            "orders": {"ar_steps": 20, "permutation_steps": 60, "rho": 8},
            "data": {
                "text": [str(self.folder / "text.jsonl")], "vocab_size": 300, "heldout_fraction": 0.1,
                "samples_per_shard": 256, "directory": str(self.folder / "data"),
            },
            "optimizer": {"lr": 1e-3, "warmup_steps": 10, "ema": 0.9},
            "train": {
                "steps": steps or self.steps, "global_batch": 8, "micro_batch": 2, "dtype": "float32", "log_every": 1,
                "eval_every": 10**6, "eval_samples": 8, "checkpoint_every": 20, "keep_checkpoints": 3,
                "hang_seconds": 4.0, "log_samples": True, "max_skipped": 5,
            },
            "parallel": {"tensor": 2},
            "report": {"wandb": "disabled"},
            "cluster": {"tasks_per_node": 4, "backoff_seconds": 0.0, "max_restarts": 20, "environment": hook},
        }  # fmt: skip
        path = self.folder / f"{run.path.name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def _launch(self) -> None:
        path = self._config(self.run_dir)
        self.log = self.folder / "launcher.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "launchers/slurm.py", "--config", str(path), "--cluster", "local"],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _end(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        jobs.cancel(self.run_dir)
        self._wait("the end of the jobs", lambda: not jobs.alive(self.run_dir), launch=False)

    def _reached(self) -> int:
        records = self.run_dir.metrics()
        return records[-1]["step"] if records else 0

    def _ranks(self) -> list[int]:
        return [beat["pid"] for beat in self.run_dir.heartbeats() if Path(f"/proc/{beat['pid']}").exists()]

    def _output(self) -> str:
        """What rank 0 has printed in all jobs."""
        logs = sorted(self.run_dir.log_paths("train", rank=0), key=lambda path: path.stat().st_mtime)
        return "".join(path.read_text(errors="replace") for path in logs)

    def _wait(self, what: str, condition: Callable[[], bool], launch: bool = True, limit: float = 120.0) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            if launch and (self.process is None or self.process.poll() is not None):
                self._launch()  # as an engineer would: the same command again
            if time.monotonic() > deadline:
                raise UserError(f"{what} did not come within {limit:.0f} s; {self.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def _resumed_at(self) -> int:
        lines = [line.rpartition("resumed from ")[2] for line in self._output().splitlines() if "resumed from " in line]
        return RunDirectory.step_of(Path(lines[-1])) if lines else 0

    def _unwritten(self) -> int:
        return self._output().count("not written, training continues")

    # --- faults: each returns what came of it once it was noticed

    def _mark(self) -> tuple[int, int]:
        self.starts = self._output().count("processes: ")
        return self.starts, len(self.run_dir.restarts())

    def _restarted(self, starts: int) -> None:
        self._wait("a new start", lambda: self._output().count("processes: ") > starts)
        self._wait("its first step", lambda: "resumed from" in self._output().rpartition("processes: ")[2])

    def _died(self, act: Callable[[], None]) -> str:
        starts, deaths = self._mark()
        act()
        self._wait("its detection", lambda: len(self.run_dir.restarts()) > deaths)
        self.noticed = time.monotonic()
        self._restarted(starts)
        return "restarted automatically: " + self.run_dir.restarts()[-1]["reason"][:40]

    def _kill_rank(self) -> str:
        return self._died(lambda: os.kill(self.draw.choice(self._ranks()), signal.SIGKILL))

    def _kill_all(self) -> str:
        return self._died(lambda: [os.kill(rank, signal.SIGKILL) for rank in self._ranks()] and None)

    def _stop_rank(self) -> str:
        return self._died(lambda: os.kill(self.draw.choice(self._ranks()), signal.SIGSTOP))

    def _kill_launcher(self) -> str:
        starts, _ = self._mark()
        assert self.process
        self.process.kill()
        self.process.wait()
        jobs.cancel(self.run_dir)
        self._wait("the end of the jobs", lambda: not jobs.alive(self.run_dir), launch=False)
        self.noticed = time.monotonic()
        self._restarted(starts)
        return "jobs cancelled; the same command resumed"

    def _terminate(self) -> str:
        starts, _ = self._mark()
        os.kill(self.draw.choice(self._ranks()), signal.SIGTERM)
        assert self.process
        process = self.process
        self._wait("the end of the run", lambda: process.poll() is not None, launch=False)
        self.noticed = time.monotonic()
        assert "the state is saved" in self.log.read_text()
        self._restarted(starts)
        return "checkpoint saved, job ended; the same command resumed"

    def _stop_everything(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()
        for rank in self._ranks():
            os.kill(rank, signal.SIGKILL)
        self._wait("the end of the jobs", lambda: not jobs.alive(self.run_dir), launch=False)

    def _good(self) -> int:
        """Number of checkpoints that a run could go on from."""
        count = 0
        for checkpoint in self.run_dir.complete_checkpoints():
            with contextlib.suppress(UserError, OSError):  # damaged, or just being removed
                manifest.verify(checkpoint)
                count += 1
        return count

    def _damage_checkpoint(self, truncate: bool) -> str:
        self._wait("a second checkpoint", lambda: self._good() > 1)
        starts, _ = self._mark()
        self._stop_everything()
        newest = self.run_dir.newest_checkpoint()
        assert newest
        _damage(self.draw.choice(sorted(newest.glob("*.distcp"))), truncate, self.draw)
        self._restarted(starts)
        self.noticed = time.monotonic()
        assert f"{newest.name} is damaged" in self._output() + self.log.read_text()
        return f"{newest.name} named and skipped"

    def _damage_shard(self, truncate: bool) -> str:
        starts, _ = self._mark()
        self._stop_everything()
        shard = self.draw.choice(sorted((self.folder / "data/train").glob("shard-*.tar")))
        good = shard.read_bytes()
        _damage(shard, truncate, self.draw)
        said = len(self.log.read_text())
        self._launch()
        process = self.process
        assert process
        self._wait("the refusal", lambda: process.poll() is not None, launch=False)
        self.noticed = time.monotonic()
        assert process.returncode == 2
        assert f"{shard.name} is damaged" in self.log.read_text()[said:]
        shard.write_bytes(good)
        self._restarted(starts)
        return f"{shard.name} named, refused until restored"

    def _nan(self) -> str:
        self._mark()
        count = self._output().count("is skipped")
        os.kill(self.draw.choice(self._ranks()), signal.SIGUSR1)
        self._wait("its detection", lambda: self._output().count("is skipped") > count)
        self.noticed = time.monotonic()
        return "step not applied"

    def _fill_disk(self) -> str:
        self._mark()
        said = self._unwritten()
        filler = self.run_dir.path.parent / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass
        time.sleep(self.draw.uniform(3, 8))  # nothing can be read from a full disk: not even progress
        filler.unlink()
        self._wait("its detection", lambda: self._unwritten() > said)
        self.noticed = time.monotonic()
        return "training continued, waiting lines written later"

    # --- the end

    def _compare(self) -> list[str]:
        """Losses and samples against a calm run in which the same steps were not applied."""
        found = {r["step"]: r["loss"] for r in self.run_dir.metrics() if "loss" in r}
        last = max(found)
        # A full disk swallows records too; those steps were applied.
        bad = [int(step) for step in re.findall(r"step (\d+) is skipped", self._output())]
        missing = [step for step in range(1, last + 1) if step not in found and step in bad]
        calm = RunDirectory(self.folder / "calm")
        path = self._config(calm, missing, steps=max(60, last))
        subprocess.run(
            [sys.executable, "launchers/slurm.py", "--config", str(path), "--cluster", "local", "--only", "train"],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        expected = {r["step"]: r["loss"] for r in calm.metrics() if "loss" in r}
        failures = [
            f"step {step}: loss {loss} instead of {expected.get(step)}"
            for step, loss in found.items()
            if expected.get(step) != loss
        ]
        seen, wanted = _samples(self.run_dir), _samples(calm)
        failures += [
            f"sample {place} was {one}" for place, one in seen.items() if place < last * 8 and wanted[place] != one
        ]
        lost = [place for place in range(last * 8) if place not in seen]
        failures += [f"{len(lost)} samples were not seen"] if lost else []
        print(
            f"\n{len(self.rows)} faults, {len(self.run_dir.restarts())} restarts, {len(missing)} steps not applied; "
            f"{len(found)} losses and {last * 8} samples compared; most work lost: "
            f"{max(row['lost_steps'] for row in self.rows)} steps, a checkpoint every 20"
        )
        return failures[:10]


def _damage(path: Path, truncate: bool, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if truncate:
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _samples(run: RunDirectory) -> dict[int, int]:
    """Sample at each place of the sequence; of steps done again, the last time counts."""
    return {
        record["first"] + place: sample
        for record in run.sample_logs()
        for place, (_, sample) in enumerate(record["ids"])
    }


def _write_text(path: Path) -> None:
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("ab", "cor", "dun", "el", "fin") for b in ("a", "eth", "ilo", "os", "um")]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=80)) + "."}) for _ in range(600)]
    path.write_text("\n".join(lines))


if __name__ == "__main__":
    cli(main)
