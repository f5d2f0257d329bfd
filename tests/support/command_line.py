"""Calls of the command `paged-kv`, and what they answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paged_kv.tools import cli

SIZES = [
    "--layers",
    "2",
    "--heads",
    "8",
    "--head-size",
    "96",
    "--context",
    "8",
    "--envs",
    "8",
    "--simulations",
    "50",
]
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
}
LIGHTZERO = """
main_config = dict(policy=dict(
    num_simulations=25, collector_env_num=8, evaluator_env_num=3,
    model=dict(world_model_cfg=dict(num_layers=2, num_heads=2, embed_dim=64, context_length=8)),
))
"""


def run(*arguments: str) -> int:
    return cli.main(["estimate", *arguments])


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What the command prints as JSON."""
    assert run(*arguments, "--json", "-") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake is answered with."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("paged-kv: ")
    assert err.count("\n") == 1
    return err.removeprefix("paged-kv: ").rstrip()


def transformer(folder: Path, **changes: Any) -> str:
    """A folder with a config.json."""
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that wrong arguments are answered with."""
    try:
        status = cli.main(arguments)
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("paged-kv: ")
    return err.removeprefix("paged-kv: ").rstrip()
