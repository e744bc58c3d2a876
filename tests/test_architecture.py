"""The structure of the code: imports point one way, an objective has one room, every field of a model has one fate."""

import ast
from pathlib import Path

import pytest

from armd_scale.config import TRAINING_ONLY, AdapterConfig, ModelConfig, PrefixConfig
from armd_scale.decoding.network import ARMDConfig
from armd_scale.traits import TRAITS

ROOT = Path(__file__).parents[1]

LAYERS = (
    "armd_scale armd_scale.errors armd_scale.logs armd_scale.files armd_scale.traits armd_scale.formulas"
    " armd_scale.processes armd_scale.startup",
    "armd_scale.orders armd_scale.packing armd_scale.config_syntax armd_scale.config armd_scale.config_files"
    " armd_scale.config_reference armd_scale.run_directory",
    "armd_scale.data armd_scale.rows",
    "armd_scale.decoding",
    "armd_scale.objectives",
    "armd_scale.inference",
    "armd_scale.model",
    "armd_scale.parallel",
    "armd_scale.training",
    "armd_scale.planning armd_scale.evaluation armd_scale.serving",
    "armd_scale.benchmarks",
    "data_pipeline",
    "launchers",
)
"""From the foundation up: a module imports from its own layer and from those below it."""
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
SOURCES = [path for package in ("armd_scale", "data_pipeline", "launchers") for path in (ROOT / package).rglob("*.py")]


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def rank_of(module):
    """The layer of the longest listed prefix of a module's name."""
    parts = module.split(".")
    return next(RANKS[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in RANKS)


def imports_of(module):
    """Modules of this project that a module imports, anywhere in it but for type checking."""
    tree, found = ast.parse(MODULES[module].read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    wrong = [other for other in imports_of(module) if rank_of(other) > rank_of(module)]
    assert not wrong, f"{module} imports from a layer above its own"


def test_no_module_imports_itself_through_others():
    graph, done = {module: imports_of(module) for module in MODULES}, set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in graph[module]:
                visit(other, [*trail, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_scripts_do_not_extend_the_path():
    for path in [*SOURCES, *(ROOT / "tools").glob("*.py")]:
        assert "sys.path" not in path.read_text(), path


def branches(tree):
    """Comparisons, cases and keys of tables that name an objective."""
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            parts = node.keys
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        for part in parts:
            for leaf in ast.walk(part) if part is not None else ():
                if isinstance(leaf, ast.Constant) and leaf.value in TRAITS:
                    yield node


@pytest.mark.parametrize("path", [*SOURCES, *(ROOT / "tools").glob("*.py")], ids=lambda path: path.name)
def test_no_branch_names_an_objective(path):
    if path == ROOT / "armd_scale/traits.py" or path.parent.name == "objectives":
        return
    found = [f"line {node.lineno}: {ast.unparse(node)}" for node in branches(ast.parse(path.read_text()))]
    assert not found


def test_the_check_of_branches_finds_them():
    source = 'if c.objective == "ar": f({"mdm": 1})\nelif c.objective in ("armd", "x"): pass'
    assert len(list(branches(ast.parse(source)))) == 3


def test_every_field_of_a_model_is_exported_or_of_training_alone():
    fields = ModelConfig.model_fields
    kept = {name for name in fields if TRAINING_ONLY not in fields[name].metadata} - {"prefix", "adapter"}
    kept |= {f"prefix_{name}" for name in PrefixConfig.model_fields}
    kept |= {f"adapter_{name}" for name in AdapterConfig.model_fields}
    standalone = set(ARMDConfig.__dataclass_fields__) - {"eos_id", "model_type"}
    assert kept == standalone
    assert set(ModelConfig(vocab_size=9, bos_id=0).exported()) == standalone
