"""Imports point down only, and the light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import paged_kv

PACKAGE = Path(paged_kv.__file__).parent

# From the bottom up. Modules of one row know nothing of each other.
LAYERS = [
    {"errors", "stats"},
    {"checks", "pages.change", "pages.handles"},
    {"pages.allocator", "pages.plan", "pages.buffers"},
    {"pages.block_tables", "pages.storage"},
    {"turns", "staging", "scope"},
    {"pages.pool"},
    {"cache"},
    {"eviction"},
    {"index"},
    {"manager"},
    {"pages", "__init__"},
    {"recording"},
    {"integrations"},
    {"tools.units", "tools.data"},
    {"tools.summary"},
    {"tools.reference"},
    {"tools.profile"},
    {"tools.html"},
    {"tools.estimate"},
    {"tools.commands"},
    {"tools.cli"},
    {"tools", "__main__"},
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
SPLIT = ("pages", "tools")  # folders of several layers
NO_TORCH = [
    "errors",
    "stats",
    "checks",
    "pages.change",
    "pages.handles",
    "pages.allocator",
    "pages.plan",
    "pages.block_tables",
    "turns",
    "scope",
    "eviction",
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


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file of the package imports when it runs, relative ones too."""
    names: set[str] = set()
    here = ["paged_kv", *path.parts[:-1]]
    for node in run_time_nodes(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def layers_used(path: Path) -> set[str]:
    """Layers of the package that a file imports; a name taken from the package itself counts as its
    top.
    """
    used = set()
    for name in imported(path):
        first, _, rest = name.partition(".")
        if first == "paged_kv":
            layer = layer_named(rest.split("."))
            used.add(layer if layer in RANK else "__init__")
    return used


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path) -> None:
    layer = layer_of(path)
    assert layer in RANK, f"{path}: give the new module a place in LAYERS"
    wrong = {used for used in layers_used(path) if used != layer and RANK[used] >= RANK[layer]}
    assert not wrong, f"{path} (layer {layer}) imports {sorted(wrong)}, which is not below it"


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
        "print(light, missing, paged_kv.BadCount is paged_kv.errors.BadCount,"
        "hasattr(paged_kv, 'BadName'),"
        "hasattr(paged_kv.tools.profile, 'profile'), hasattr(paged_kv.tools.profile, 'nothing'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True [] True False True False"


def test_only_a_profile_decides_ties() -> None:
    """What patches LightZero's search tree is for comparisons: no search of a user goes near it."""
    ties = "paged_kv.tools.profile.ties"
    users = [path for path in FILES if any(name.startswith(ties) for name in imported(path))]
    assert users == [Path("tools", "profile", "call.py")]


def test_the_walker_sees_relative_and_plain_imports() -> None:
    assert any(name.startswith("paged_kv.errors") for name in imported(Path("cache.py")))


def test_the_package_carries_its_data() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "tools" / "data" / "cartpole.safetensors").stat().st_size < 2_000_000
