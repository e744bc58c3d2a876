"""Measurements of one GPU as a list of registered functions, and the runner that fits them into a time budget.

- ``measurement`` registers a generator of ``Figure`` objects with its worth and its estimated seconds.
- ``Runner`` runs each measurement in a process of its own, in order of worth, and rewrites the results file after
  every figure. A measurement that fails or exceeds its time limit does not affect the next one.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from armd_scale.files import write_atomically
from armd_scale.processes import die_with_parent

Sign = Literal["<=", ">="]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured value. A figure with a ``limit`` passes or fails."""

    name: str
    value: float
    unit: str = ""
    limit: float | None = None
    sign: Sign = "<="
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of the value, for the results file."""

    @property
    def passed(self) -> bool | None:
        """Whether the value is within its limit; None without a limit, False for NaN."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.sign == "<=" else self.value >= self.limit

    def record(self) -> dict[str, Any]:
        """For the results file; a value that is not finite becomes null."""
        value = self.value if math.isfinite(self.value) else None
        return {**dataclasses.asdict(self), "value": value, "passed": self.passed}


@dataclasses.dataclass(frozen=True)
class Context:
    """Arguments of a measurement."""

    device: str
    """``cuda`` or ``cpu``."""
    quick: bool
    """Toy sizes, to try the tool itself."""
    shared: str
    """Directory for results that several measurements share."""
    trace: str | None = None
    """Directory for profiles."""

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"


Function = Callable[[Context], Iterator[Figure]]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A registered measurement."""

    name: str
    worth: int
    """Measurements run in descending order of worth."""
    seconds: float
    """Estimate on one H100, with the start of a process and compilation."""
    quick_seconds: float
    """Estimate at toy sizes on two CPU cores."""
    needs_gpu: bool
    checks_results: bool
    """A failed limit means wrong results, not a missed target."""
    function: Function

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").split("\n")[0]

    def estimate(self, quick: bool) -> float:
        return self.quick_seconds if quick else self.seconds


MEASUREMENTS: dict[str, Measurement] = {}
MODULES = ("armd_scale.benchmarks.gpu_correctness", "armd_scale.benchmarks.gpu_speed")
"""Modules that register measurements."""


def load() -> dict[str, Measurement]:
    """All registered measurements by name."""
    for module in MODULES:
        importlib.import_module(module)
    return MEASUREMENTS


def measurement(
    name: str,
    *,
    worth: int,
    seconds: float,
    quick_seconds: float,
    needs_gpu: bool = False,
    checks_results: bool = False,
) -> Callable[[Function], Function]:
    """Register a generator of figures under ``name``."""

    def register(function: Function) -> Function:
        if name in MEASUREMENTS:
            raise ValueError(f"there are two measurements '{name}'")
        MEASUREMENTS[name] = Measurement(name, worth, seconds, quick_seconds, needs_gpu, checks_results, function)
        return function

    return register


def ordered(measurements: Iterable[Measurement]) -> list[Measurement]:
    """In the order in which they run."""
    return sorted(measurements, key=lambda m: -m.worth)


def schedule_table(measurements: Iterable[Measurement], quick: bool, budget: float | None) -> str:
    """The measurements in the order in which they run, with their estimates and the running sum."""
    lines = [f"{'':<20}{'seconds':>8}{'sum':>7}"]
    total = 0.0
    for m in ordered(measurements):
        total += m.estimate(quick)
        late = "   over budget" if budget is not None and total > budget else ""
        lines.append(f"{m.name:<20}{m.estimate(quick):>8.0f}{total:>7.0f}   {m.summary}{late}")
    return "\n".join(lines)


class Runner:
    """Runs measurements within a budget and keeps the results file up to date."""

    GRACE = 2.0
    """A measurement may take this many times its estimate as long as the budget lasts."""
    SMALLEST_LIMIT = 60.0
    """Seconds that any measurement may take as long as the budget lasts."""

    def __init__(self, context: Context, path: Path | None, budget: float | None, facts: dict[str, Any]) -> None:
        """``path``: the results file; ``budget``: seconds from now; ``facts``: further fields of the results file."""
        self.context, self.path, self.budget = context, path, budget
        self.started = time.monotonic()
        self.results: dict[str, Any] = {**facts, "budget_seconds": budget, "measurements": {}}
        self._write()

    @property
    def left(self) -> float:
        """Remaining seconds of the budget."""
        return float("inf") if self.budget is None else self.budget - (time.monotonic() - self.started)

    def run(self, measurements: Iterable[Measurement]) -> None:
        for m in ordered(measurements):
            estimate = m.estimate(self.context.quick)
            if m.needs_gpu and self.context.device != "cuda":
                self._skip(m, "needs a GPU")
            elif estimate > self.left:
                self._skip(m, f"estimated at {estimate:.0f} s, {max(self.left, 0):.0f} s left")
            else:
                self._measure(m, estimate)

    def wrong(self) -> list[str]:
        """Names of the figures that show wrong results."""
        return [
            figure["name"]
            for name, entry in self.results["measurements"].items()
            for figure in entry.get("figures", [])
            if MEASUREMENTS[name].checks_results and figure["passed"] is False
        ]

    def _skip(self, m: Measurement, reason: str) -> None:
        print(f"\n{m.name}: skipped ({reason})", flush=True)
        self.results["measurements"][m.name] = {"status": "skipped", "reason": reason}
        self._write()

    def _measure(self, m: Measurement, estimate: float) -> None:
        limit = min(self.left, max(self.GRACE * estimate, self.SMALLEST_LIMIT))
        print(f"\n{m.name}: {m.summary} (about {estimate:.0f} s)", flush=True)
        entry: dict[str, Any] = {"status": "running", "estimate": estimate, "figures": []}
        self.results["measurements"][m.name] = entry
        self._write()
        started = time.monotonic()
        status, reason = "failed", "interrupted"
        try:
            status, reason = self._child(m, limit, entry)
        finally:
            entry |= {"status": status, "seconds": round(time.monotonic() - started, 2)}
            if reason:
                entry["reason"] = reason
            self._write()
            compiled = f", {entry['compile_seconds']:.1f} s of them compilation" if "compile_seconds" in entry else ""
            print(f"  {status} in {entry['seconds']:.1f} s{compiled}{f': {reason}' if reason else ''}", flush=True)

    def _child(self, m: Measurement, limit: float, entry: dict[str, Any]) -> tuple[str, str]:
        """Run a measurement in a separate process; returns status and reason, and adds its messages to ``entry``."""
        receive, send = os.pipe()
        program = f"from {__name__} import child; child()"
        context = json.dumps(dataclasses.asdict(self.context))
        words = [sys.executable, "-c", program, m.function.__module__, m.name, context, str(send)]
        process = subprocess.Popen(words, pass_fds=[send], start_new_session=True, preexec_fn=die_with_parent)
        os.close(send)
        deadline, rest = time.monotonic() + limit, b""
        try:
            with open(receive, "rb", buffering=0) as pipe, selectors.DefaultSelector() as selector:
                selector.register(pipe, selectors.EVENT_READ)
                while True:
                    if not selector.select(max(deadline - time.monotonic(), 0)):
                        return "too slow", f"stopped after {limit:.0f} s"
                    received = pipe.read(65536)
                    if not received:
                        break
                    *lines, rest = (rest + received).split(b"\n")
                    for line in lines:
                        self._take(m, json.loads(line), entry)
            code = process.wait()
            return ("failed", entry.pop("error", f"exit code {code}")) if code else ("done", "")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _take(self, m: Measurement, message: dict[str, Any], entry: dict[str, Any]) -> None:
        figure = message.get("figure")
        if figure is None:
            entry.update(message)
        else:
            entry["figures"].append(figure)
        self._write()
        if figure is not None:
            print("  " + describe(figure, m.checks_results), flush=True)

    def _write(self) -> None:
        if self.path:
            write_atomically(self.path, json.dumps(self.results, indent=1) + "\n")


def describe(figure: dict[str, Any], checks_results: bool) -> str:
    """A figure as a line of text."""
    value = "none" if figure["value"] is None else f"{figure['value']:.4g}"
    line = f"{figure['name']:<58}{value:>12} {figure['unit']:<9}"
    if figure["limit"] is not None:
        verdict = ("ok", "WRONG") if checks_results else ("met", "missed")
        line += f"{figure['sign']} {figure['limit']:<8g} {verdict[0] if figure['passed'] else verdict[1]}"
    return line.rstrip()


def child() -> None:
    """Main function of the process of a measurement: writes figures as JSON lines into a pipe."""
    module, name, context, send = sys.argv[1:]
    with open(int(send), "w", buffering=1, encoding="utf-8") as pipe:
        try:
            importlib.import_module(module)
            registered, settings = MEASUREMENTS[name], Context(**json.loads(context))
            for figure in registered.function(settings):
                if settings.quick and not registered.checks_results:  # targets are those of full sizes
                    figure = dataclasses.replace(figure, limit=None)
                print(json.dumps({"figure": figure.record()}), file=pipe)
            from torch._dynamo.utils import calculate_time_spent

            print(json.dumps({"compile_seconds": calculate_time_spent()["total_wall_time"]}), file=pipe)
        except BaseException as error:
            traceback.print_exc()
            text = " ".join(str(error).split())
            print(json.dumps({"error": f"{type(error).__name__}: {text}"[:500]}), file=pipe)
            pipe.flush()
            os._exit(1)  # what failed may also hang at its end
