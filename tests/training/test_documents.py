"""Separate documents from the text to the exported model: scored in training as each is by itself."""

import json
import shutil

import numpy as np
import pytest
import torch

from armd_scale import inference, orders
from armd_scale.config import RunConfig
from armd_scale.data.shards import DOCUMENTS, LOSS, PackedDataset
from armd_scale.errors import UserError
from armd_scale.objectives.armd import STREAM_TOKENS
from armd_scale.training.samples import Samples
from data_pipeline import prepare
from tests.conftest import run_processes
from tests.runs import PANGRAMS, run, start
from tests.training.test_export import _export

LAYOUTS = {"stream": {"context": 2}, "best-fit": {"tensor": 2, "sequence": True}}


def configure(folder, layout, **data):
    """A run on documents of 1 to 12 words, several of which go into a sample."""
    words, draw = PANGRAMS.split(), np.random.default_rng(0)
    text = folder / "text.jsonl"
    lines = [json.dumps({"text": " ".join(draw.choice(words, draw.integers(1, 13)))}) for _ in range(400)]
    text.write_text("\n".join(lines))
    fields = run(folder, text, folder / "run", 2, 1, micro_batch=2, eval_samples=8).model_dump()
    fields["data"] |= {"documents": "separate", **data}
    fields["orders"] |= {"drafts": 2}
    fields["parallel"] |= layout
    return RunConfig.model_validate(fields)


@pytest.mark.parametrize("pack", ["stream", "best-fit"])
def test_held_out_losses_are_those_of_the_documents(tmp_path, pack):
    config = configure(tmp_path, LAYOUTS[pack], pack=pack)
    prepare.prepare(config)
    records = start(config)
    last = [record for record in records if "heldout_strided" in record][-1]
    run_processes(1, _export, config, tmp_path / "out", 10**9)
    model = inference.load(tmp_path / "out")
    heldout = PackedDataset(config.data_directory / "heldout")
    numbers = np.arange(8) * len(heldout) // 8
    sequences = heldout.sequences(numbers, True)
    assert sum(map(len, sequences)) == heldout.flags(numbers, LOSS).sum()
    assert heldout.flags(numbers, LOSS).all() == (pack == "stream")
    assert min(map(len, sequences)) < STREAM_TOKENS < max(map(len, sequences))
    lags, accepted, reached = 2, [], []
    found = {"left_to_right": [], "strided": []}
    for sequence in sequences:
        tokens = torch.from_numpy(sequence)[None]
        size = len(sequence)
        found["left_to_right"] += model.nll(tokens)[0].tolist()
        few = max(1, min(config.train.eval_streams, size // STREAM_TOKENS))
        layout = orders.strided(size, config.train.eval_streams if size == config.model.length else few)
        order, blocks = (torch.from_numpy(np.array(field)) for field in layout)
        found["strided"] += model.nll(tokens, order, blocks)[0, order - 1].tolist()
        if size > lags:
            shared = model.acceptance(tokens, lags)[:, 0].double()
            accepted.append(shared)
            reached.append(shared.cumprod(0))
    for kind, values in found.items():
        assert np.mean(values) == pytest.approx(last[f"heldout_{kind}"], abs=2e-5), kind
    if pack == "stream":
        means = torch.cat(accepted, dim=1).mean(1)
        assert [last["acceptance_1"], last["acceptance_2"]] == pytest.approx(means.tolist(), abs=1e-5)
        assert last["tokens_per_pass"] == pytest.approx(float(1 + torch.cat(reached, dim=1).sum(0).mean()), abs=1e-5)
    else:
        assert Samples(config).counted_share == pytest.approx(
            PackedDataset(config.data_directory / "train").index["counted"]
            / PackedDataset(config.data_directory / "train").index["tokens"]
        )


def test_data_of_before_is_joined(data, tmp_path):
    """Without borders it trains as before, and separate documents are refused with a line."""
    shutil.copytree(data / "data", tmp_path / "data")
    joined = run(tmp_path, data / "text.jsonl", tmp_path / "run")
    folder = tmp_path / "data/train"
    samples = Samples(joined)
    expected = samples.read(0, 8)
    assert samples.starts(0, 8) is None
    assert samples.counted(0, 8) is None
    separate = joined.model_copy(update={"data": joined.data.model_copy(update={"documents": "separate"})})
    assert Samples(separate).starts(0, 8).any()
    assert PackedDataset(folder).has(DOCUMENTS)

    from armd_scale.data import shards

    dataset = PackedDataset(folder)
    tokens = dataset.read(np.arange(len(dataset))).astype(np.uint16)
    index = dataset.index
    for path in folder.glob("*.tar"):
        path.unlink()
    places = shards.cut(tokens.size, 32, 16)
    written = [shards.write_shard(folder, place, tokens.ravel()[place.start : place.stop], 32) for place in places]
    kept = {name: index[name] for name in ("vocab_size", "bos_id", "eos_id", "tokenizer_sha256", "bytes")}
    shards.write_index(folder, written, 32, {**kept, "tokens": tokens.size})
    assert np.array_equal(Samples(joined).read(0, 8), expected)
    with pytest.raises(UserError, match="no borders of documents, which data.documents=separate needs"):
        Samples(separate)
