"""The benchmarks of Hugging Face models run at small sizes, and the page shows their figures."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RUN = BENCHMARKS / "llm" / "run.py"
sys.path.insert(0, str(BENCHMARKS))

from llm import beams, exact, memory, step, tables, trees  # noqa: E402

pytestmark = pytest.mark.huggingface


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that is small."""
    made = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(made)
    return made


def measured(part: Any, folder: Path) -> dict[str, Any]:
    """What a part finds at small sizes; its table says the same."""
    found = part.measure(argparse.Namespace(model=folder, quick=True))
    again = json.loads(json.dumps(found))  # as the page sees it
    assert part.table(again) == part.table(found)
    return again


def test_step(folder: Path) -> None:
    found = measured(step, folder)
    assert [row["rows"] for row in found["cases"]] == [3, 1]
    for row in found["cases"]:
        assert set(row["over_empty"]) == set(row["seconds"])
        assert row["over_empty"]["empty"] == 1
        assert row["largest_difference"] < 1e-5 < row["largest_logit"]


def test_memory(folder: Path) -> None:
    found = measured(memory, folder)
    (tree,) = found["trees"]
    assert [each["page_size"] for each in tree["pages"]] == memory.SIZES
    shares = [each["in_use_over_unique"] for each in tree["pages"]]
    assert shares == sorted(shares)
    assert 1 <= shares[0] < 1.05
    assert shares[-1] < tree["deep_copies_over_unique"]
    assert len({each["bytes"]["unique"] for each in tree["pages"]}) == 1
    assert [row["page_size"] for row in found["costs"]] == memory.SIZES


def test_trees_have_nodes_of_the_lengths_that_were_drawn() -> None:
    tree = trees.Tree(16, 3)
    drawn = trees.expansions(tree)
    assert drawn == trees.expansions(tree) != trees.expansions(tree, seed=1)
    lengths = [length for each in drawn for length in each.lengths]
    assert len(lengths) == tree.nodes - 1
    assert {4, 28} >= {min(min(lengths), 4), max(max(lengths), 28)}
    assert all(each.node <= 8 * number for number, each in enumerate(drawn))


def test_beams(folder: Path) -> None:
    found = measured(beams, folder)
    for row in found["prompts"]:
        ways = row["ways"]
        assert all(ways[name]["same_tokens"] for name in ("DynamicCache", "pages", "pages, sdpa"))
        assert ways["pages"]["kv_bytes"] < ways["DynamicCache"]["kv_bytes"]
        assert ways["pages"]["reserved_bytes"] >= ways["pages"]["kv_bytes"]


def test_exact(folder: Path) -> None:
    rows = measured(exact, folder)["rows"]
    assert {row["model"] for row in rows} == {*exact.FAMILIES, "language model"}
    assert sum(row["nodes"] for row in rows) >= 240
    for row in rows:
        assert row["argmax_differs"] == row["of_them_ties"]
        assert row["pages_difference"] < (1e-4 if row["dtype"] == "float32" else 0.5)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, where no model is named by the environment."""
    clean = {key: value for key, value in os.environ.items() if key != "PAGED_KV_SMOLLM2"}
    command = [sys.executable, str(RUN), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean)


def test_the_command_writes_what_it_prints(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run("beams", "--quick", "--model", str(folder), "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout == tables.markdown(json.loads(out.read_text())) + "\n"


@pytest.mark.parametrize("arguments", [[], ["--model", "nowhere"]])
def test_a_folder_that_is_missing_is_one_line(arguments: list[str]) -> None:
    done = run("beams", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "$PAGED_KV_SMOLLM2" in done.stderr


def test_the_tables_go_between_their_marks() -> None:
    page = "a\n<!-- results: one -->\nold\n<!-- end of results -->\nb\n<!-- results: two -->\n"
    with pytest.raises(SystemExit, match="results: two"):
        tables.written(page, "two", "new")
    with pytest.raises(SystemExit, match="results: three"):
        tables.written(page, "three", "new")
    assert tables.written(page, "one", "new") == page.replace("old", "new")


@pytest.mark.parametrize("part", tables.PARTS)
def test_the_page_shows_what_was_measured(part: str) -> None:
    """The committed page is what the committed numbers give; without numbers it has no table."""
    page = tables.PAGE.read_text()
    path = tables.measured().get(part)
    text = tables.markdown(json.loads(path.read_text())) if path else ""
    assert tables.written(page, part, text).replace("-->\n\n<", "-->\n<") == page, (
        "run: benchmarks/llm/tables.py --write"
    )
