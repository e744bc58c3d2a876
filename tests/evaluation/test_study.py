"""Studies: the file, what is measured of a run, and the page that is made of the figures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from armd_scale import config_files, config_syntax
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.evaluation import study as studies
from armd_scale.evaluation import study_page
from tests.runs import run, start
from tests.test_config import STUDIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path, tmp_path):
    """Every run has a configuration of its own that differs from the others as it says."""
    study = studies.load(path)
    (tmp_path / "run.yaml").write_text(config_syntax.write(study.run))
    made = {run: study.config(run, tmp_path, []) for run in studies.runs(study)}
    assert len({config.directory for config in made.values()}) == len(made)
    shapes = {}
    for one, config in made.items():
        assert (config.seed, config.train.global_batch) == (one.seed, study.run["train"]["global_batch"])
        values = config.model_dump(exclude={"name", "run_dir", "seed"})
        shapes.setdefault(one.variant, values)
    assert len({json.dumps(values) for values in shapes.values()}) == len(shapes)
    assert made[studies.Run("ar", 0)].objective == "ar"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        pytest.param({"variants": {"armd": {}, "judge": {}}}, "needs the variant 'ar'", id="no-ar"),
        pytest.param({"slot": 3}, "slot: Extra inputs", id="unknown-key"),
        pytest.param({"seeds": [1]}, "seeds", id="one-seed"),
        pytest.param({"streams": [2, 4]}, "streams must hold 1", id="streams-without-1"),
        pytest.param(
            {"variants": {"ar": {}, "armd": {}, "mdm": {"seeds": [7]}, "judge": {}}},
            "'mdm' has the seed 7",
            id="seed-of-one-variant",
        ),
        pytest.param(
            {"variants": {"ar": {}, "armd": {}, "mdm": {}, "judge": {}, "x": {"beside": "y"}}},
            "needs the variant 'y'",
            id="beside-no-variant",
        ),
        pytest.param(
            {"variants": {"ar": {}, "armd": {}, "mdm": {}, "judge": {}, "a b": {}, "a-b": {}}},
            "a-b-0",
            id="one-directory-twice",
        ),
    ],
)
def test_studies_that_are_refused(tmp_path, change, line):
    path = tmp_path / "study.yaml"
    good = yaml.safe_load(STUDIES[0].read_text())
    path.write_text(yaml.safe_dump(good | change))
    with pytest.raises(UserError, match=line):
        studies.load(path)


def test_a_study_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no study file"):
        studies.load(tmp_path / "none.yaml")


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    """A study of eight steps, measured."""
    out = tmp_path_factory.mktemp("study")
    base = run(data, data / "text.jsonl", out / "unused").model_dump()
    base["orders"]["strided_steps"] = 0
    base["train"] |= {"keep_every": 2, "eval_every": 2}
    extra = {"armd": {"set": ["orders.strided_steps=4"]}, "mdm": {"set": ["objective=mdm", "train.steps=8"]}}
    ablation = {"rho 2": {"set": ["orders.rho=2"], "question": "rho"}}
    variants = {"ar": {"set": ["objective=ar"]}, **extra, "judge": {"set": ["objective=ar"], "seeds": [9]}, **ablation}
    study = studies.Study.model_validate(
        {"name": "s", "run": base, "variants": variants, "seeds": [0, 1], "heldout_samples": 6, "texts": 4,
         "streams": [1, 4]}
    )  # fmt: skip
    (out / "run.yaml").write_text(yaml.safe_dump(base))
    where = {"python": "3", "packages": {"torch": "2"}, "cores": 4}
    found = {"name": "s", "command": "c", "commit": "0" * 40, "environment": where, "minutes": 1.0, "runs": {}}
    made = {one: study.config(one, out, []) for one in studies.runs(study)}
    for config in made.values():
        start(RunConfig.model_validate(config.model_dump()))
        config_files.save(config, config.directory / "config.yaml")
    judge = next(config.directory for one, config in made.items() if one.variant == "judge")
    for one, config in made.items():
        figures = studies.measure(study, one, config.directory, study.equal_steps(made), judge, None)
        found["runs"].setdefault(one.variant, {})[str(one.seed)] = figures
    found |= {"study": study.model_dump(), "equal_steps": study.equal_steps(made)}
    studies.write_results(out / "results.json", found)
    return json.loads((out / "results.json").read_text())


def test_what_is_measured(results):
    runs = results["runs"]
    assert list(runs["armd"]["0"]["checkpoints"]) == ["6", "8", "10"]
    assert list(runs["mdm"]["1"]["checkpoints"]) == ["6", "8"]
    assert list(runs["rho 2"]["0"]["checkpoints"]) == ["6"]
    at_once = runs["armd"]["0"]["checkpoints"]["6"]
    assert set(at_once["heldout"]) == {"left-to-right", "shuffled:2", "shuffled:32", "strided:4"}
    assert [row["tokens_a_step"] for row in at_once["texts"]] == [1, 4]
    # The same samples as in training's last evaluation at that step: the same figure.
    curve = dict(runs["armd"]["0"]["curve"])
    assert at_once["heldout"]["left-to-right"]["nll"] == pytest.approx(curve[6], abs=1e-4)
    assert runs["ar"]["0"]["flops_per_token"] < runs["armd"]["0"]["flops_per_token"]
    assert "texts" not in runs["rho 2"]["0"]["checkpoints"]["6"]


def test_the_page(results, tmp_path):
    study_page.write(tmp_path, results)
    text = (tmp_path / "README.md").read_text()
    one, other = (results["runs"][name] for name in ("armd", "ar"))
    logs = [
        one[seed]["checkpoints"]["6"]["heldout"]["left-to-right"]["nll"]
        - other[seed]["checkpoints"]["6"]["heldout"]["left-to-right"]["nll"]
        for seed in "01"
    ]
    value, error = 100 * math.expm1(np.mean(logs)), 100 * math.exp(np.mean(logs)) * np.std(logs, ddof=1) / math.sqrt(2)
    assert f"{value:+.1f} ± {error:.1f} %" in text
    for words in ("rho 2", "strided fine-tuning", "masked diffusion", "self-BLEU"):
        assert words in text
    for picture in ("loss.png", "quality.png", "ablations.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
        assert f"({picture})" in text


def test_a_page_without_masked_diffusion_and_texts(results, tmp_path):
    runs = {name: seeds for name, seeds in results["runs"].items() if name not in ("mdm", "judge")}
    study_page.write(tmp_path, results | {"runs": runs})
    text = (tmp_path / "README.md").read_text()
    logs = [
        np.subtract(
            *(runs[name][seed]["checkpoints"]["6"]["heldout"]["left-to-right"]["nll"] for name in ("rho 2", "ar"))
        )
        for seed in "01"
    ]
    value, error = np.mean(logs), np.std(logs, ddof=1) / math.sqrt(2)
    row = next(line for line in text.splitlines() if line.startswith("| rho 2 |"))
    assert row.endswith(f"| {100 * math.expm1(value):+.1f} ± {100 * math.exp(value) * error:.1f} % |")
    assert "MDM" not in text
    assert "judge" not in text
    assert not (tmp_path / "quality.png").exists()


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "docs" / "results" / "fidelity").glob("*/results.json")), ids=lambda p: p.parent.name
)
def test_published_pages_are_those_of_their_figures(folder, tmp_path):
    """What is committed under docs/results/fidelity is what its figures say."""
    study_page.write(tmp_path, json.loads(folder.read_text()))
    assert (tmp_path / "README.md").read_text() == folder.with_name("README.md").read_text()


def test_steps_to():
    curve = [[10, 5.0], [20, 4.0], [40, 3.0]]
    assert study_page.steps_to(curve, 4.5) == 15
    assert study_page.steps_to(curve, 3.25) == 35
    assert study_page.steps_to(curve, 6.0) == 10
    assert study_page.steps_to(curve, 2.9) is None
