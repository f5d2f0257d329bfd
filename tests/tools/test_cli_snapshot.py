"""`paged-kv snapshot`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paged_kv import PagedKVCache
from paged_kv.snapshot import save
from paged_kv.tools import cli


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cache = PagedKVCache(
        layers=2, heads=3, head_size=4, value_head_size=5, page_size=2, dtype=torch.bfloat16
    )
    (root,) = cache.new()
    keys, values = (torch.ones(2, 1, 3, 5, size, dtype=torch.bfloat16) for size in (4, 5))
    cache.append([root], keys * torch.arange(5.0)[:, None].bfloat16(), values)
    save(tmp_path / "run", cache, [root, *cache.fork([root])], identity={"weights": "a1"})
    return tmp_path / "run"


def test_it_says_what_a_folder_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["snapshot", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        str(folder),
        "cache          2 layers x 3 heads x 4 and 5, bfloat16, pages of 2 tokens",
        "sequences      2, 10 tokens",
        "pages          3, 648 B",
        "in files       3 pages, 648 B, 1 segments",
        "keys and data  19 B",
        "identity       weights: a1",
        "state          every page is as it was saved",
    ]


def test_damage_is_a_failure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = folder.glob("pages-*")
    data = bytearray(path.read_bytes())
    data[4200] ^= 1
    path.write_bytes(data)
    assert cli.main(["snapshot", str(folder), "--quick"]) == 0
    assert "pages were not read" in capsys.readouterr().out
    assert cli.main(["snapshot", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "holds a page that was damaged" in err


def test_what_is_no_snapshot_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        assert cli.main(["snapshot", str(path)]) == 1
        assert "it has no manifest.json" in capsys.readouterr().err
