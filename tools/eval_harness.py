"""EleutherAI's lm-evaluation-harness with the models of this project.

python tools/eval_harness.py run --model armd --model_args pretrained=MODEL_DIR --tasks lambada_openai,hellaswag

All arguments are those of the ``lm_eval`` command.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armd_scale.errors import UserError, cli


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        import armd_scale.evaluation.harness  # noqa: F401  (registers the model)
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -c constraints.txt -e '.[eval]'") from error
    cli_evaluate()


if __name__ == "__main__":
    cli(main)
