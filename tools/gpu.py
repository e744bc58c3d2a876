"""Check correctness and measure speed on one GPU, within a time budget: the command ``armd bench gpu``.

python tools/gpu.py --seconds 540 --json gpu.json                # on a machine with one H100
python tools/gpu.py --seconds 540 --json gpu.json --wheels .whl  # without a network: installs wheels first
python tools/gpu.py --device cpu --quick                         # toy sizes, a trial without a GPU
python tools/gpu.py --list --seconds 540                         # measurements in their order
python tools/gpu.py --report docs/results                        # write the results page from DIR/gpu/*.json

It sets PYTHONPATH, so that the command runs on machines where armd_scale is not installed.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    words = sys.argv[1:]
    environment = dict(os.environ)
    places = [str(ROOT)]
    if "--wheels" in words:
        at = words.index("--wheels")
        folder, words = words[at + 1 : at + 2], words[:at] + words[at + 2 :]
        places.append(install(Path(*folder)) if folder else fail("--wheels needs a directory"))
        environment["ARMD_SCALE_SITE"] = places[-1]  # deleted at the end
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*places, os.environ.get("PYTHONPATH")]))
    environment["PYTHONUNBUFFERED"] = "1"
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "launchers.cli", "bench", "gpu", *words], environment)


def install(wheels: Path) -> str:
    """Install the wheels of a directory beside the packages that are there; the directory that they are in."""
    files = sorted(map(str, wheels.glob("*.whl"))) or fail(f"there are no wheels in {wheels}")
    site = tempfile.mkdtemp(prefix="armd-scale-")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", site]
    if subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=False).returncode:
        fail(
            f"the wheels in {wheels} cannot be installed (see above): make them for Python "
            f"{sys.version_info.major}.{sys.version_info.minor}, see docs/results/performance.md"
        )
    return site


def fail(line: str):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
