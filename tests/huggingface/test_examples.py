"""The examples, as they are run: each finds what it finds without a cache, in less memory."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
SAVES = {"ppo_mcts": 5, "particles": 3}  # how many times as much a copy for every node would hold


def run(name: str, *arguments: str) -> None:
    """As `python examples/NAME.py ARGUMENTS`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        sys.modules.pop("common")


def test_all_are_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAVES, "common"}
    assert all(len(path.read_text().splitlines()) < 150 for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("seed", ["0", "3"])
@pytest.mark.parametrize("name", SAVES)
def test_an_example_finds_the_same_without_a_cache(
    name: str, seed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, "--check", "--seed", seed)
    said = capsys.readouterr().out
    assert "without a cache: the same" in said
    (times,) = re.findall(r"\((\d+\.\d) x\)", said)
    assert float(times) > SAVES[name]


@pytest.mark.parametrize("name", SAVES)
def test_an_example_takes_a_model_of_ones_own(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path)
    run(name, "--model", str(tmp_path))
    said = capsys.readouterr().out
    assert re.search(r"'[a-z ]+'", said)
    assert "without a cache" not in said


def save_model(folder: Path) -> None:
    """A tiny model, and a tokenizer whose tokens are letters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import common

        common.tiny_model().save_pretrained(folder)
        sys.modules.pop("common")
    letters = "MTHabcdefghijklmnopqrstuvwxyz"
    words = {"?": 0, " ": 1, **{letter: place + 3 for place, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.save_pretrained(folder)


def test_a_check_that_fails_is_an_error() -> None:
    found = runpy.run_path(str(EXAMPLES / "common.py"))
    found["told"](True)
    with pytest.raises(SystemExit):
        found["told"](False)


def test_particles_share_what_they_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of much weight goes on several times, and its pages are held once."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = runpy.run_path(str(EXAMPLES / "particles.py"))
    common = sys.modules.pop("common")
    lm = found["PagedLM"](common.tiny_model(), progress=False)
    nodes = lm.prefill([[3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13]])
    held = lm.stats().kv_bytes
    before = [found["Particle"](node, weight) for node, weight in zip(nodes, (0.0, -9.0, -9.0))]
    after = found["resampled"](lm, before, torch.Generator().manual_seed(0))
    assert [particle.node.tokens for particle in after] == [nodes[0].tokens] * 3
    assert [particle.weight for particle in after] == pytest.approx([-1.0983] * 3, abs=1e-3)
    assert lm.stats().kv_bytes == held
    lm.logits([particle.node for particle in after])
    assert lm.stats().tokens_fed == 5 + 3 + 3
