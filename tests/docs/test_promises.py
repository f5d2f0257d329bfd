"""What pyproject.toml promises of other packages is what the tests run with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def promised(package: str) -> str:
    """The oldest release that may be installed."""
    found = re.search(rf'"{package}>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    ("package", "where"),
    [("torch", "Makefile"), ("numpy", "Makefile"), ("sortedcontainers", "Makefile")],
)
def test_the_oldest_release_that_is_promised_is_tested(package: str, where: str) -> None:
    tested = re.search(rf"^.*\b{package}==([\d.]+)", (ROOT / where).read_text(), re.MULTILINE)
    assert tested is not None
    assert tested[1] == f"{promised(package)}.0"
