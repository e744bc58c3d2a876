"""The command ``armd``: finds the module of a sub-command, imports it and runs it.

A command's module defines ``add_arguments(parser)`` and ``run(args)``; its docstring is the description in ``--help``.
No other command is imported, and modules import slow packages in ``run`` only, which keeps help and typing errors fast.
"""

import argparse
import importlib
import sys
from typing import NamedTuple, NoReturn

from armd_scale.errors import UserError, cli


class Command(NamedTuple):
    """A sub-command of ``armd``."""

    module: str
    summary: str
    """Its line in ``armd --help``."""


COMMANDS = {
    "train": Command("launchers.commands.train", "start or resume a run on Slurm or on this machine"),
    "status": Command("launchers.commands.status", "show the jobs and the progress of a run"),
    "logs": Command("launchers.commands.logs", "print the output of a process of a run"),
    "cancel": Command("launchers.commands.cancel", "end the jobs of a run"),
    "prepare": Command("launchers.commands.prepare", "prepare the data of a run on this machine, without training"),
    "inspect": Command("data_pipeline.inspect", "verify and summarise prepared data"),
    "plan": Command("launchers.commands.plan", "predict memory, time and traffic of a run, without a GPU"),
    "export": Command("launchers.commands.export", "write a checkpoint as a standalone model directory"),
    "import": Command("launchers.commands.import_model", "start a run with the weights of a model directory"),
    "generate": Command("launchers.commands.generate", "generate or infill text"),
    "serve": Command("launchers.commands.serve", "serve a model over HTTP"),
    "eval zeroshot": Command("launchers.commands.eval_zeroshot", "perplexity and bits per byte on texts"),
    "eval generation": Command("launchers.commands.eval_generation", "quality against speed of generated texts"),
    "eval harness": Command("launchers.commands.eval_harness", "tasks of lm-evaluation-harness"),
    "bench data": Command("launchers.commands.bench_data", "speed of data preparation and streaming"),
    "bench decode": Command("launchers.commands.bench_decode", "speed of decoding"),
    "bench train": Command("launchers.commands.bench_train", "speed of training steps"),
    "bench gpu": Command("launchers.commands.bench_gpu", "correctness and speed on one GPU, within a time budget"),
}
GROUPS = sorted({name.partition(" ")[0] for name in COMMANDS if " " in name})
"""First words that need a second one."""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other bad input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(words: list[str] | None = None) -> NoReturn:
    """Run ``armd`` with ``words`` (default: those of the command line) and exit."""
    cli(lambda: _run(sys.argv[1:] if words is None else words))


def _run(words: list[str]) -> int | None:
    group = words[0] if words and words[0] in GROUPS else ""
    name, rest = " ".join(words[: 2 if group else 1]), words[2 if group else 1 :]
    last = name.removeprefix(group).strip()
    if last in ("", "-h", "--help"):
        print(overview(group), file=sys.stdout if last else sys.stderr)
        return 0 if last else 2
    if name == "--version":
        import armd_scale

        print(f"armd_scale {armd_scale.__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(_unknown(name, group))
    module = importlib.import_module(COMMANDS[name].module)
    if not hasattr(module, "add_arguments"):  # another program reads the words
        return module.run(rest)
    parser = _Parser(
        prog=f"armd {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    return module.run(parser.parse_intermixed_args(rest))


def overview(group: str = "") -> str:
    """Help of ``armd``, or of the commands that begin with ``group``."""
    prefix = f"{group} " if group else ""
    names = [name for name in COMMANDS if name.startswith(prefix)]
    width = max(map(len, names)) + 2
    return "\n".join(
        [
            f"usage: armd {prefix}COMMAND ...",
            "",
            "Pretraining and decoding of Auto-Regressive Masked Diffusion language models.",
            "",
            *(f"  {name:<{width}}{COMMANDS[name].summary}" for name in names),
            "",
            f"armd {prefix}COMMAND --help describes a command.",
        ]
    )


def _unknown(name: str, group: str) -> str:
    import difflib

    prefix = f"{group} " if group else ""
    names = [known.removeprefix(prefix) for known in [*COMMANDS, *GROUPS] if known.startswith(prefix)]
    nearest = difflib.get_close_matches(name.removeprefix(prefix), names, n=1)
    hint = f"did you mean '{prefix}{nearest[0]}'?" if nearest else f"see armd {prefix}--help"
    return f"there is no command '{name}': {hint}"


if __name__ == "__main__":
    main()
