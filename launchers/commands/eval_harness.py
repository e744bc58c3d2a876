"""Evaluate a model on tasks of EleutherAI's lm-evaluation-harness.

    armd eval harness run --model armd --model_args pretrained=MODEL_DIR --tasks lambada_openai,hellaswag

All arguments are those of the ``lm_eval`` command, which reads and describes them.
"""

import sys

from armd_scale.errors import UserError
from launchers.commands import arguments


def run(words: list[str]) -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        import armd_scale.evaluation.harness  # noqa: F401  (registers the model)
    except ImportError as error:
        raise UserError(arguments.not_installed(error.name, "eval")) from error
    sys.argv[1:] = words
    cli_evaluate()
