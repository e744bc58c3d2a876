"""The results page of GPU measurements, made from the results files of ``tools/gpu.py``."""

import json
from pathlib import Path
from typing import Any

from armd_scale.benchmarks import registry
from armd_scale.errors import UserError
from armd_scale.files import write_atomically

PAGE = "performance.md"
HEAD = """# Performance on a GPU

`armd bench gpu --report docs/results` writes this page from the results files in `docs/results/gpu/`,
one per GPU and date. [cpu.md](cpu.md#targets-for-one-h100) has the targets, and what `armd plan`
predicts.

```sh
armd bench gpu --seconds 540 --json docs/results/gpu/h100-DATE.json --trace traces
armd bench gpu --list --seconds 540
armd bench gpu --report docs/results
```

Each measurement runs in its own process with a time limit. The results file is rewritten after every
figure, so a run that is stopped keeps its figures. Measurements that do not fit the time budget are
skipped and named. `--device cpu --quick` runs the measurements at toy sizes without a GPU.

To add a measurement, write a generator of `Figure` objects in `armd_scale/benchmarks/gpu_speed.py` or
`gpu_correctness.py`, and register it:

```python
@measurement("long-prefill", worth=40, seconds=30, quick_seconds=5)
def long_prefill(context: Context) -> Iterator[Figure]:
    \"\"\"Seconds and memory of a prefill of 32,768 tokens\"\"\"
    yield Figure("prefill, 32,768 tokens", seconds, "s", limit=2.0)
```

On a machine with PyTorch, transformers and numpy but no network, `python tools/gpu.py --wheels DIR`
installs the other packages first and takes the same options. The wheels must be made for the Python
version of that machine, here 3.12:

```sh
pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \\
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any -d DIR -c constraints.txt \\
    megatron-core pydantic pydantic-core annotated-types typing-inspection einops msgpack psutil PyYAML webdataset \\
    braceexpand zstandard submitit cloudpickle
pip wheel --no-deps -w DIR -c constraints.txt deepspeed hjson antlr4-python3-runtime
```

"""


def write(directory: Path) -> None:
    """Write ``directory``/performance.md from ``directory``/gpu/*.json; ``UserError`` for an unreadable file."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    write_atomically(directory / PAGE, page(results(directory / "gpu")))


def results(directory: Path) -> dict[str, dict[str, Any]]:
    """Results files by name; those of toy sizes are refused."""
    found = {}
    for path in sorted(directory.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            usable = isinstance(content["measurements"], dict) and not content["quick"]
        except (ValueError, KeyError, TypeError):
            usable = False
        if not usable:
            raise UserError(f"{path} is not a results file of tools/gpu.py at full size: move it away")
        found[path.stem] = content
    return found


def page(files: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    measurements = registry.ordered(registry.load().values())
    text = HEAD
    if files:
        text += "| results | GPU | date | commit | versions |\n|---|---|---|---|---|\n"
        for name, content in files.items():
            versions = dict(content["environment"])
            gpu = versions.pop("GPU", "none")
            words = ", ".join(f"{package} {version}" for package, version in versions.items())
            text += f"| {name} | {gpu} | {content['date']} | {str(content['commit'])[:12]} | {words} |\n"
    for m in measurements:
        text += f"\n## {m.name}\n\n{m.summary}.\n\n"
        text += _table(m, files)
    return text


def _table(m: registry.Measurement, files: dict[str, dict[str, Any]]) -> str:
    entries = {name: content["measurements"].get(m.name, {}) for name, content in files.items()}
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for name, entry in entries.items():
        for figure in entry.get("figures", []):
            figures.setdefault(figure["name"], {})[name] = figure
    if not figures:
        return "Not measured.\n"
    lines = [f"| figure | limit | {' | '.join(entries)} |", "|---|---|" + "---|" * len(entries)]
    for name, by_file in figures.items():
        known = next(iter(by_file.values()))
        limit = "" if known["limit"] is None else f"{known['sign']} {known['limit']:g}"
        cells = [_cell(by_file.get(file)) for file in entries]
        lines.append(f"| {name} | {limit} | {' | '.join(cells)} |")
    for name, entry in entries.items():
        if entry.get("status") not in ("done", None):
            lines.append(f"\n{name}: {entry['status']} ({entry.get('reason', 'interrupted')}).")
    return "\n".join(lines) + "\n"


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "not measured"
    value = "none" if figure["value"] is None else f"{figure['value']:.4g}"
    mark = {True: " ✓", False: " ✗", None: ""}[figure["passed"]]
    return f"{value} {figure['unit']}".rstrip() + mark
