"""A model directory to serve."""

import os
from pathlib import Path

import pytest

from armd_scale.data import tokenizer as tokenizers
from tests.conftest import PAPER, model_folder

WORDS = "Return the class of a function, naïve words and 你好, with its arguments:\n\tx = y(z)  # comment\n" * 20


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A model of random weights; ``ARMD_MODEL`` names a trained one instead."""
    if os.environ.get("ARMD_MODEL"):
        return Path(os.environ["ARMD_MODEL"])
    tokenizer = tokenizers.train([WORDS], tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 298)
    return model_folder(tmp_path_factory.mktemp("model"), PAPER.model_copy(update={"length": 64}), tokenizer)
