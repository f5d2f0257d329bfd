"""Imports point down only, and the light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import paged_kv

PACKAGE = Path(paged_kv.__file__).parent

# From the bottom up. Modules of one row know nothing of each other.
CORE = [
    {"errors", "stats"},
    {"checks", "pages.records", "pages.handles"},
    {"pages.change", "pages.allocator", "pages.buffers", "bundles.codec", "bundles.contents"},
    {"events", "pages.tree", "pages.plan", "pages.plane", "bundles.bundle"},
    {"pages.storage", "pages.codes"},
    {"pages.quantised"},
    {"pages.kinds"},
    {"pages.books"},
    {"pages.audit", "pages.block_tables", "pages.lease", "pages.tiers"},
    {"pages.open_steps", "tensors", "scope", "weights"},
    {"attention.contract", "attention.scratch", "attention.compiled", "linears"},
    {"attention.runs", "attention.queries", "attention.in_pages"},
    {"attention.parts"},
    {"attention.cost", "attention.layout"},
    {"attention.part_work"},
    {"attention.rowwise", "attention.tree"},
    {"attention.choice"},
    {"turns", "pages.pool", "attention.dense", "attention.kernels"},
    {"attention"},
    {"pages.making", "bundles.holders"},
    {"append", "bundles.exchange", "gather", "step", "paged_step"},
    {"opening"},
    {"cache"},
    {"eviction", "search_nodes"},
    {"entries", "search_order"},
    {"draft", "shelf"},
    {"index"},
    {"manager"},
]
LAYERS = [
    *CORE,
    {"pages", "bundles", "tiers", "__init__"},
    {"recording", "snapshot"},
    {"integrations"},
    {"tools.units", "tools.data"},
    {"tools.summary"},
    {"tools.workers"},
    {"tools.reference"},
    {"tools.profile"},
    {"tools.search"},
    {"tools.html"},
    {"tools.estimate"},
    {"tools.commands"},
    {"tools.cli"},
    {"tools", "__main__"},
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
SPLIT = ("pages", "attention", "bundles", "tools")  # folders of several layers
NO_TORCH = [
    "errors",
    "stats",
    "checks",
    "pages.records",
    "pages.change",
    "pages.handles",
    "pages.tree",
    "pages.allocator",
    "pages.plan",
    "pages.books",
    "pages.audit",
    "pages.block_tables",
    "pages.lease",
    "pages.open_steps",
    "attention.contract",
    "attention.runs",
    "attention.parts",
    "attention.cost",
    "events",
    "turns",
    "scope",
    "eviction",
    "search_nodes",
    "search_order",
    "entries",
    "bundles.codec",
    "bundles.contents",
    "bundles.holders",
    "draft",
    "shelf",
    "index",
    "manager",
]
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """The layer of a file."""
    return layer_named(path.with_suffix("").parts)


def layer_named(parts: Sequence[str]) -> str:
    """The layer of a module: its folder in the package, or its own name; two names in a folder of
    several layers.
    """
    if parts[0] not in SPLIT:
        return parts[0]
    return ".".join(part for part in parts[:2] if part != "__init__")


def run_time_nodes(tree: ast.AST) -> list[ast.AST]:
    """All nodes but the bodies of `if TYPE_CHECKING:`, which name types and load nothing."""
    nodes: list[ast.AST] = [tree]
    for node in nodes:  # grows while it is walked
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        ):
            nodes.extend(node.orelse)
        else:
            nodes.extend(ast.iter_child_nodes(node))
    return nodes


def imported(path: Path, *, types: bool = False) -> set[str]:
    """Dotted names of all that a file of the package imports when it runs, relative ones too; with
    `types`, for type checkers as well.
    """
    names: set[str] = set()
    here = ["paged_kv", *path.parts[:-1]]
    tree = ast.parse((PACKAGE / path).read_text())
    for node in ast.walk(tree) if types else run_time_nodes(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def layers_used(path: Path, *, types: bool = False) -> set[str]:
    """Layers of the package that a file imports; a name taken from the package itself counts as its
    top.
    """
    used = set()
    for name in imported(path, types=types):
        first, _, rest = name.partition(".")
        if first == "paged_kv":
            layer = layer_named(rest.split("."))
            used.add(layer if layer in RANK else "__init__")
    return used


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path) -> None:
    layer = layer_of(path)
    assert layer in RANK, f"{path}: give the new module a place in LAYERS"
    core = any(layer in row for row in CORE)  # not even type checkers go round in circles there
    found = layers_used(path, types=core)
    wrong = {used for used in found if used != layer and RANK[used] >= RANK[layer]}
    assert not wrong, f"{path} (layer {layer}) imports {sorted(wrong)}, which is not below it"


def test_no_files_import_each_other_in_a_circle() -> None:
    """Not even for type checkers. The faces of packages, which hand names on, are left out."""
    modules = {
        ".".join(["paged_kv", *path.with_suffix("").parts]): path
        for path in FILES
        if path.name != "__init__.py"
    }
    uses: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = [name.split(".") for name in imported(path, types=True)]
        prefixes = {".".join(name[:length]) for name in names for length in range(len(name) + 1)}
        uses[module] = prefixes & modules.keys() - {module}
    TopologicalSorter(uses).prepare()  # raises CycleError, which names the circle


# What may be read of others although it begins with an underscore.
OTHERS = {
    *("_asdict", "_make", "_replace"),  # of named tuples
    *("_C", "_schema", "_version", "_parameters", "_buffers", "_modules"),  # of torch
    *("_current_level", "_reorder_linear_weight", "_linear_pointwise"),
    *("_nbytes", "_is_mkldnn_bf16_supported"),
    *("_current_frames", "_getframe"),  # of sys
    # of transformers
    *("_attn_implementation", "_supports_attention_backend", "_is_stateful"),
    *("_prepare_generation_config", "_prepare_special_tokens"),
    *("_get_logits_processor", "_get_stopping_criteria"),
    # of LightZero: contexts, models, policies, environments
    *("_cache", "_k_cache", "_v_cache", "_reanalysis_seeded_root_keys"),
    *("_initialize_cache_structures", "_initialize_transformer_keys_values"),
    *("_variable_context_lengths", "_get_rotary_frequencies"),
    *("_model", "_policy", "_cfg", "_collect_model", "_forward_collect", "_mcts_collect"),
    *("_reset_collect", "_env", "_eval_episode_return", "_init_flag", "_timestep"),
}


def is_own(owner: ast.expr, classes: set[str]) -> bool:
    """Whether an expression stands for the object itself, or for a class of its module."""
    if isinstance(owner, ast.Call):
        return isinstance(owner.func, ast.Name) and owner.func.id == "super"
    return isinstance(owner, ast.Name) and owner.id in {"self", "cls", *classes}


def privates(path: Path) -> list[str]:
    """Where a file reads or writes what belongs to another object alone."""
    tree = ast.parse((PACKAGE / path).read_text())
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    return [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
        and node.attr not in OTHERS
        and not is_own(node.value, classes)
        and not (isinstance(node.value, ast.Attribute) and node.value.attr == "_C")
    ]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nobody_reaches_into_another_object(path: Path) -> None:
    found = privates(path)
    assert not found, "\n".join(found)


def foreign(layer: str, seen: set[str]) -> set[str]:
    """Top-level packages that a layer needs, those of the layers below it included."""
    seen.add(layer)
    path = Path(layer.replace(".", "/")).with_suffix(".py")
    needs = {name.partition(".")[0] for name in imported(path)} - {"paged_kv"}
    for below in layers_used(path) - seen:
        needs |= foreign(below, seen)
    return needs


@pytest.mark.parametrize("layer", NO_TORCH)
def test_bookkeeping_needs_no_torch(layer: str) -> None:
    assert "torch" not in foreign(layer, set())


def test_import_stays_light() -> None:
    heavy = [
        "transformers",
        "lzero",
        "ding",
        "zoo",
        "rich",
        "safetensors",
        "prometheus_client",
        "tensorboardX",
        "altair",
        "vl_convert",
        "msgspec",
        "xxhash",
        "ray",
    ]
    code = (
        "import sys, paged_kv, paged_kv.recording; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_load_when_asked_for() -> None:
    code = (
        "import sys, paged_kv, paged_kv.tools.cli, paged_kv.tools.profile; light = 'torch' not "
        "in sys.modules;"
        "import paged_kv.errors;"
        "missing = [name for name in paged_kv.__all__ if not hasattr(paged_kv, name)];"
        "print(light, missing, paged_kv.errors.BadCount is paged_kv.errors.BadCount,"
        "hasattr(paged_kv, 'BadName'),"
        "hasattr(paged_kv.tools.profile, 'profile'), hasattr(paged_kv.tools.profile, 'nothing'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True [] True False True False"


def test_who_decides_ties() -> None:
    """What patches LightZero's search tree is for comparisons, and for collections that are
    repeated: no other search of a user goes near it.
    """
    ties = "paged_kv.integrations.ties"
    users = [path for path in FILES if any(name.startswith(ties) for name in imported(path))]
    profile = Path("tools", "profile", "call.py")
    assert users == [Path("integrations", "ray", "collecting.py"), profile]


def test_the_walker_sees_relative_and_plain_imports() -> None:
    assert any(name.startswith("paged_kv.errors") for name in imported(Path("cache.py")))


def test_the_package_carries_its_data() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "tools" / "data" / "cartpole.safetensors").stat().st_size < 2_000_000
