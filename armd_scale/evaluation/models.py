"""The model to be scored, wherever it is: a standalone folder, or a training checkpoint of any layout."""

from pathlib import Path

import torch

from armd_scale import inference
from armd_scale import tokenizer as tokenizers
from armd_scale.errors import UserError
from armd_scale.inference import ARMD
from armd_scale.tokenizer import Tokenizer


def open_model(path: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[ARMD, Tokenizer]:
    """The model and tokenizer of a standalone folder, a run folder (its newest checkpoint), or a checkpoint in one.

    Of a checkpoint the moving average of the weights is taken, where it holds one. Raises ``UserError``.
    """
    if (path / "config.json").is_file() or not path.is_dir():
        model = inference.load(path, device, dtype)
        return model, tokenizers.load(path, model.config.vocab_size)
    from armd_scale.training import export, manifest

    run = next((place for place in (path, *path.resolve().parents[:2]) if (place / "config.yaml").is_file()), None)
    if run is None:
        raise UserError(f"{path} holds no model: name a model folder, a run folder or one of its checkpoints")
    config = export.load_run(run)
    source = export.newest_checkpoint(config) if run == path else path
    if run != path:
        manifest.verify(source)
    model, tokenizer = export.in_memory(config, source)
    return model.to(device, dtype), tokenizer
