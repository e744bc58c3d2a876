"""The language of configuration files: what YAML 1.1 reads otherwise, and what users write."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from armd_scale import config_files, config_syntax
from armd_scale.errors import UserError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\norders:\n  streams: [1, 2, 4]\ndata:\n  mixture:\n    - {directory: a}\n")
    return path


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=010", 10),
        ("train.steps=1e5", 100_000),
        ("train.steps=60_000", 60_000),
        ("train.warn=12:30", "12:30"),
        ("cluster.sbatch.time=12:00:00", "12:00:00"),
        ("cluster.sbatch.requeue=true", True),
        ("report.prompt=The ", "The "),
        ("report.prompt= The", " The"),
        ("report.prompt='The '", "The "),
        ("report.prompt=Title: The # 1", "Title: The # 1"),
        ("report.prompt=- a", "- a"),
        ("report.prompt=@all *x* &c !d %e", "@all *x* &c !d %e"),
        ("report.prompt=a=b", "a=b"),
        ("report.prompt=2026-11-28", "2026-11-28"),
        ("report.prompt=<<", "<<"),
        ("report.wandb=off", "off"),
        ("model.kv_heads=", None),
        ("model.kv_heads=null", None),
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.lr=0x10", 16),
        ("optimizer.lr=-.inf", -math.inf),
        ("orders.streams.0=2", 2),
        ("data.mixture.0.weight=2.5", 2.5),
        ("cluster.environment.A=[1, {b: c}]", [1, {"b": "c"}]),
    ],
)
def test_values(file, override, value):
    tree = config_syntax.read(file, [override])
    for key in override.partition("=")[0].split("."):
        tree = tree[int(key) if isinstance(tree, list) else key]
    assert tree == value
    assert isinstance(tree, type(value))


@pytest.mark.parametrize(
    ("overrides", "name", "value"),
    [
        (["name=007"], "name", "007"),
        (["name=1e3"], "name", "1e3"),
        (["cluster.environment.NCCL_IB_DISABLE=1"], "cluster.environment", {"NCCL_IB_DISABLE": "1"}),
        (["cluster.environment={UMASK: 0077, 1: 2.50}"], "cluster.environment", {"UMASK": "0077", "1": "2.50"}),
        (["data.text=[1.jsonl, 2024]"], "data.text", ["1.jsonl", "2024"]),
        (["cluster.sbatch={time: 12:00:00, nice: 10, exclusive: true}"], "cluster.sbatch",
         {"time": "12:00:00", "nice": 10, "exclusive": True}),
        (["optimizer.lr=1e0"], "optimizer.lr", 1.0),
        (["train.steps=1e5", "orders.ar_steps=1e3"], "train.steps", 100_000),
        (["train.log_samples=yes", "data.verify=off"], "train.log_samples", True),
        (["data.verify=off"], "data.verify", False),
        (["report.prompt=no"], "report.prompt", "no"),
        (["orders.streams.1=8"], "orders.streams", [1, 8, 4]),
    ],
)  # fmt: skip
def test_fields(file, overrides, name, value):
    config = config_files.load(file, overrides)
    for part in name.split("."):
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("name=???", "name is ???, which stands for a value to be given"),
        ("orders.streams.3=2", "orders.streams has 3 elements, numbered from 0"),
        ("orders.streams.x=2", "orders.streams has 3 elements"),
        ("report.generate_streams.0=2", "give the whole list"),
        ("name=true", "quote a word to make it text: name='true'"),
        ("report.prompt='tis", "cannot be read"),
        ("cluster.environment={A: 1, A: 2}", "the key 'A' occurs twice"),
        ("train.steps=1e9999", "too large"),
        ("train..steps=1", "not of the form"),
        ("train.steps=1.5", "train.steps = 1.5"),
        ("report.prompt=\udce9", "cannot be read"),
        ("train.steps=12:30", "train.steps = '12:30'"),
    ],
)
def test_mistakes(file, override, line):
    with pytest.raises(UserError) as error:
        config_files.load(file, [override])
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "a: {b: 1, b: 2}\n", "a: *b\n", "a: !!python/object:os.system {}\n"])
def test_broken_files_are_one_line(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="cannot be read as YAML") as error:
        config_syntax.read(path)
    assert "\n" not in str(error.value)


def test_a_placeholder_can_be_replaced(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: ???\nreport: {prompt: '???'}\n")
    with pytest.raises(UserError, match=r"name is \?\?\?.*name=VALUE"):
        config_files.load(path)
    config = config_files.load(path, ["name=x"])
    assert (config.name, config.report.prompt) == ("x", "???")


def test_anchors_and_merge_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("cluster:\n  tokenise: &small {cpus: 2}\n  export: {<<: *small, memory_gb: 8}\n")
    export = config_files.load(path).cluster.export
    assert (export.cpus, export.memory_gb) == (2, 8)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.from_regex(r"[-+.0-9eEx_:~?]{1,8}", fullmatch=True),
    st.sampled_from(["yes", "off", "010", "1e3", "0x1", "12:30", "2026-11-28", "<<", "=", "???", "~", "1_0"]),
)


@given(st.dictionaries(st.text(min_size=1), SCALARS, min_size=1))
def test_what_is_written_is_read_back(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    path.write_text(config_syntax.write(values), encoding="utf-8")
    read = config_syntax.read(path)
    assert read == values
    path.write_text(config_syntax.write(read), encoding="utf-8")
    assert config_syntax.as_written(config_syntax.read(path)) == config_syntax.as_written(read)


@given(st.floats(allow_nan=False) | st.integers() | st.text() | st.booleans())
def test_yaml_of_other_programs(tmp_path_factory, value):
    """What PyYAML writes, such as the configurations of version 0.1, is read with the same values."""
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    path.write_text(yaml.safe_dump({"a": value}))
    assert config_syntax.read(path) == {"a": value}
