"""What changes between two preparations: text, tokenizer, place. Nothing is mixed, and nothing is reused by mistake."""

import json
import os
import threading
import time

import numpy as np
import pytest
import tokenizers as library

from armd_scale.config import RunConfig
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.shards import PackedDataset
from armd_scale.errors import UserError
from armd_scale.files import exclusive
from data_pipeline import prepare, units

WORDS = [f"w{n}" for n in range(40)]


def write_tokenizer(folder, shift=0):
    """Words with ids that ``shift`` permutes."""
    folder.mkdir(exist_ok=True)
    vocabulary = {"<eos>": 0, "?": 1, "\n": 2} | {word: 3 + (n + shift) % len(WORDS) for n, word in enumerate(WORDS)}
    words = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<eos>"])
    words.save(str(folder / "tokenizer.json"))


@pytest.fixture
def config(tmp_path):
    """A run on 60 documents in two files."""
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        lines = [json.dumps({"text": " ".join(draw.choice(WORDS, 30))}) for _ in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    write_tokenizer(tmp_path / "tokenizer")
    return run(tmp_path)


def run(folder, **data):
    fields = {"text": [f"{folder}/*.jsonl"], "tokenizer": f"{folder}/tokenizer", "workers": 1, "heldout_fraction": 0.2}
    model = {"length": 16}
    return RunConfig.model_validate(
        {"run_dir": f"{folder}/run", "model": model, "orders": {"rho": 8}, "data": {**fields, **data}}
    )


def texts(config):
    """The training text of a prepared data set, as the tokenizer of the data set reads it."""
    folder = config.data_directory
    tokenizer = tokenizers.load(folder / "tokenizer")
    data = PackedDataset(folder / "train")
    return " ".join(tokenizer.decode(row.tolist()) for row in data.read(range(len(data))))


def test_a_tokenizer_that_changes_under_a_preparation(config, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "PART_BYTES", 1000)
    prepare.begin(config)
    work = units.tokenise(str(tmp_path / "run/.data.partial"), 0)
    assert work["tokens"]
    write_tokenizer(tmp_path / "tokenizer", shift=7)
    prepare.prepare(config)
    alone = run(tmp_path, directory=f"{tmp_path}/alone")
    prepare.prepare(alone)
    assert texts(config) == texts(alone)
    write_tokenizer(tmp_path / "tokenizer", shift=3)
    with pytest.raises(UserError, match=r"other settings \(tokenizer\)"):
        prepare.prepare(config)
    (tmp_path / "tokenizer/tokenizer.json").unlink()
    (tmp_path / "tokenizer").rmdir()
    assert prepare.prepare(config)["samples"], "complete data does not need the original"


def edit(path):
    """Change a file without a change of its size."""
    text = path.read_text()
    path.write_text(text.replace("w1", "w2"))
    os.utime(path, ns=(1, 1))


def test_an_edit_of_equal_size_is_noticed(config, tmp_path):
    prepare.begin(config)
    edit(tmp_path / "a.jsonl")
    prepare.tokenise(config)
    with pytest.raises(UserError, match=r"text changed while it was prepared \(.*a.jsonl has changed"):
        prepare.merge(config)
    prepare.prepare(config)
    edit(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"b.jsonl has changed; data.check_text=size accepts"):
        prepare.prepare(config)
    assert prepare.prepare(run(tmp_path, check_text="size"))["samples"]


def test_a_copy_of_the_text_is_accepted_where_its_hash_is_known(tmp_path, config):
    hashed = run(tmp_path, check_text="sha256")
    prepare.prepare(hashed)
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    for check in ("size", "mtime", "sha256"):
        assert prepare.prepare(run(tmp_path, check_text=check))["samples"]


@pytest.mark.parametrize("change", ["missing", "new"])
def test_files_that_come_and_go(config, tmp_path, change):
    prepare.prepare(config)
    if change == "new":
        (tmp_path / "c.jsonl").write_text('{"text": "w1"}\n')
    else:
        (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=rf"jsonl is {change}"):
        prepare.prepare(config)


@pytest.mark.parametrize("name", ["linked.jsonl", "../{root}/a.jsonl", "./a.jsonl"])
def test_held_out_text_by_another_name(config, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked.jsonl").symlink_to("a.jsonl")
    heldout = name.format(root=tmp_path.name)
    with pytest.raises(UserError, match="share files"):
        prepare.prepare(run(tmp_path, text=[f"{tmp_path}/a.jsonl"], heldout_text=[heldout]))


def test_a_single_text_file(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "input.txt").write_text("".join(f"w{n % 40} w{n * 7 % 40}\n" for n in range(3000)))
    config = run(tmp_path, text=[f"{tmp_path}/input.txt"], heldout_fraction=0.1)
    index = prepare.prepare(config)
    heldout = PackedDataset(config.data_directory / "heldout").index
    assert heldout["tokens"] / (heldout["tokens"] + index["tokens"]) == pytest.approx(0.1, rel=0.05)
    lines = run(tmp_path, text=[f"{tmp_path}/input.txt"], directory=f"{tmp_path}/lines", txt_document="line")
    index = prepare.prepare(lines)
    count = index["documents"] + PackedDataset(lines.data_directory / "heldout").index["documents"]
    assert count == 3000
    with pytest.raises(UserError, match=r"\(txt_document\)"):
        prepare.prepare(run(tmp_path, text=[f"{tmp_path}/input.txt"], directory=f"{tmp_path}/lines"))


def test_a_name_that_is_not_utf8(tmp_path, capsys):
    write_tokenizer(tmp_path / "tokenizer")
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps({"text": f"w{n % 40} w2 w3 w4"}) + "\n" for n in range(200))
    config = run(tmp_path)
    assert list(prepare.prepare(config)["sources"]) == ["caf\ufffd.jsonl"]
    assert prepare.prepare(config)["samples"]


def test_complete_data_needs_no_lock(config, tmp_path, monkeypatch):
    index = prepare.prepare(config)

    def refuse(*_, **__):
        raise PermissionError("a read-only place")

    monkeypatch.setattr(prepare, "exclusive", refuse)
    assert prepare.prepare(config) == index


def test_a_second_preparation_waits(config, tmp_path):
    lock = tmp_path / "run/.data.lock"
    results = []
    second = threading.Thread(target=lambda: results.append(prepare.prepare(config)))
    with exclusive(lock, "the data"):
        second.start()
        time.sleep(0.3)
        assert not results
    second.join(60)
    assert results[0]["samples"]


def test_members_of_a_tar_that_are_no_text_are_counted(tmp_path):
    import io
    import tarfile

    write_tokenizer(tmp_path / "tokenizer")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for n in range(100):
            content = " ".join(WORDS[(n + k) % 40] for k in range(20)).encode() if n % 2 else b"\xff\xd8"
            member = tarfile.TarInfo(f"{n}.{'txt' if n % 2 else 'jpg'}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    config = run(tmp_path, text=[f"{tmp_path}/x.tar"])
    prepare.prepare(config)
    counts = json.loads((config.data_directory / "complete.json").read_text())["records"]
    assert counts["ignored"] == 50
    assert counts["train"] + counts["heldout"] == 50
    assert counts["records"] == 100
