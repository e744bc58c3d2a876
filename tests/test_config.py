"""The configuration: what it accepts, and the one line that it answers with."""

from pathlib import Path

import pytest
import yaml

from armd_scale import config as configs
from armd_scale import config_files, config_reference
from armd_scale.errors import UserError

SHIPPED = Path(__file__).parents[1] / "configs"
STUDIES = sorted((SHIPPED / "fidelity").glob("*.yaml"))
CONFIGS = sorted(set(SHIPPED.rglob("*.yaml")) - set(STUDIES))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nmodel:\n  layers: 4\ntrain:\n  global_batch: 16\n")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path):
    config = config_files.load(path)
    assert config.micro_batches >= 1
    assert config.total_steps > 0


def test_every_field_is_documented():
    def check(section):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            inner = config_files._section_of(field.annotation)
            if inner:
                check(inner)

    check(configs.RunConfig)


def test_the_reference_page_is_generated_from_the_fields():
    page = Path(__file__).parents[1] / "docs/reference/configuration.md"
    assert page.read_text(encoding="utf-8") == config_reference.page(), "run python -m armd_scale.config_reference"


def test_the_reference_page_has_every_field():
    page = config_reference.page()
    for name in config_files._all_names(configs.RunConfig):
        assert f"| `{name.rpartition('.')[2]}` |" in page or name == "model.objective"
    for line in (
        "| `seed` | int (>= 0, < 2,147,483,648) | `0` |",
        "| `dim` | int (>= 2, multiple of 2) or null | `null` |",
    ):
        assert line in page


def test_overrides_and_round_trip(file, tmp_path):
    config = config_files.load(
        file, ["model.layers=6", "optimizer.lr=1e-3", "orders.streams=[1,8]", "model.kv_heads=null"]
    )
    assert (config.model.layers, config.optimizer.lr, config.orders.streams) == (6, 1e-3, [1, 8])
    config_files.save(config, tmp_path / "resolved.yaml")
    assert config_files.load(tmp_path / "resolved.yaml") == config
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text())["model"]["layers"] == 6


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.layer=4", "unknown key 'model.layer'; did you mean 'model.layers'"),
        ("modle.layers=4", "unknown key 'modle'; did you mean 'model'"),
        ("layers=4", "unknown key 'layers'; did you mean 'model.layers'"),
        ("model.layers=four", "model.layers = 'four'"),
        ("model.layers=4.5", "model.layers = 4.5"),
        ("model.layers=0", "model.layers = 0"),
        ("model.layers=true", "model.layers = True"),
        ("model.norm=batchnorm", "model.norm = 'batchnorm'"),
        ("train.dtype=float16", "train.dtype"),
        ("train.profile=[5,4]", "profile = [5, 4] must be the first and the last step"),
        ("train.profile=[0,4]", "train.profile.0"),
        ("train.profile=[4]", "train.profile"),
        ("model.heads=7", "hidden (768) must be an even multiple of heads (7)"),
        ("model.kv_heads=5", "heads (12) must be a multiple of kv_heads (5)"),
        ("model.two_stream_layers=9", "exceeds layers (4)"),
        ("orders.rho=2000", "orders.rho = 2000 exceeds model.length"),
        ("orders.ar_steps=50000", "permutation_steps"),
        ("parallel.tensor=3", "1 processes (cluster.nodes x cluster.tasks_per_node) cannot be split into groups of"),
        ("parallel.pipeline=2", "groups of parallel.tensor = 1 x parallel.pipeline = 2"),
        ("parallel.chunks=2", "parallel.chunks = 2 needs parallel.pipeline of at least 2"),
        ("parallel.cut=[1]", "parallel.cut = [1] must be 0 growing layer numbers"),
        ("parallel.zero=4", "parallel.zero = 4"),
        ("parallel.zero=0", "keeps no float32 master weights for train.dtype = bfloat16"),
        ("seed=4294967296", "seed = 4294967296"),
        ("optimizer.lr=.inf", "optimizer.lr = inf"),
        ("report.generate_streams=[]", "report.generate_streams"),
        ("train.global_batch=12", "not a multiple of 8"),
        ("cluster.gpus_per_node=2", "one process per GPU"),
        ("model", "not of the form"),
        ("=3", "not of the form"),
    ],
)
def test_mistakes_are_one_line(file, override, line):
    with pytest.raises(UserError) as error:
        config_files.load(file, [override])
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just words", "\x00"])
def test_broken_files(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        config_files.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no configuration file"):
        config_files.load(tmp_path / "absent.yaml")


def test_layout_that_needs_more_heads(file):
    with pytest.raises(UserError, match="model.heads = 12 .* parallel.tensor = 8"):
        config_files.load(file, ["cluster.tasks_per_node=8", "parallel.tensor=8"])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["parallel.zero=2"], "parallel.zero = 1"),
        (["parallel.zero=3"], "ZeRO-3"),
        (["parallel.chunks=4"], "parallel.pipeline x parallel.chunks = 8"),
        (["parallel.cut=[2, 1]"], "between 1 and 3"),
        (["parallel.cut=[4]"], "between 1 and 3"),
        (["parallel.chunks=2", "train.micro_batch=16"], "micro-batches of a step (1)"),
    ],
)
def test_pipelines_that_cannot_work(file, overrides, line):
    with pytest.raises(UserError) as error:
        config_files.load(file, ["cluster.tasks_per_node=2", "parallel.pipeline=2", *overrides])
    assert line in str(error.value)


@pytest.mark.parametrize("text", ["5", "true", "null", "", "name: [1"])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        config_files.load(path)


def test_text_that_looks_like_an_interpolation(file, tmp_path):
    config = config_files.load(file).model_copy(update={"name": "costs ${5}"})
    config_files.save(config, tmp_path / "again.yaml")
    assert config_files.load(tmp_path / "again.yaml") == config


def test_vocabulary_must_agree(file):
    config = config_files.load(file, ["model.vocab_size=100"])
    with pytest.raises(UserError, match="vocab_size is 100"):
        configs.with_vocabulary(config, 110, 1)
    assert configs.with_vocabulary(config, 90, 1).model.vocab_size == 100, "pretrained models have unused entries"
    assert configs.with_vocabulary(config, 100, 1).model.bos_id == 1


def test_derived_sizes():
    model = configs.ModelConfig(layers=5, hidden=96, heads=6, mlp="swiglu", vocab_size=130)
    assert (model.ffn_width, model.two_stream, model.key_heads, model.padded_vocab) == (256, 2, 6, 256)
