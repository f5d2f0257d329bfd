"""Sizes out of configurations: LightZero's python modules, and the config.json of a transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import LIGHTZERO, LLAMA, figures, refused, run, transformer

# -- LightZero's configurations


@pytest.mark.lightzero
@pytest.mark.parametrize(
    ("config", "envs", "ring"),
    [
        ("classic_control.cartpole.config.cartpole_unizero_config", 8, 50),
        ("memory.config.memory_unizero_config", 10, 50),
    ],
)
def test_configurations_of_the_zoo(
    config: str, envs: int, ring: int, capsys: pytest.CaptureFixture[str]
) -> None:
    import zoo.classic_control

    path = Path(zoo.classic_control.__file__).parent.parent / (config.replace(".", "/") + ".py")
    found = figures(capsys, "--lightzero-config", str(path))
    assert (found["workload"]["envs"], found["workload"]["ring_simulations"]) == (envs, ring)
    if envs == 8:
        preset = figures(capsys, "--preset", "cartpole")
        assert {k: v for k, v in found.items() if k not in ("name", "workload")} == {
            k: v for k, v in preset.items() if k not in ("name", "workload")
        }


def test_a_configuration_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("print('noise')\n" + LIGHTZERO)
    found = figures(capsys, "--lightzero-config", str(file))
    assert found["workload"]["envs"] == 8  # that of the collector, where the world model has none
    assert found["lightzero"]["kv"] == 3473408
    file.write_text(
        LIGHTZERO.replace(
            "context_length=8", "context_length=8, num_simulations=20, max_cache_size=9"
        )
    )
    assert run("--lightzero-config", str(file)) == 0
    printed = capsys.readouterr().out
    assert "LightZero's ring has places for 20 simulations: with 25 it overwrites nodes" in printed
    assert "with 8 older roots an environment" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "it sets no main_config"),
        (
            "def main(): pass",
            "it sets no main_config, but a main() that may make one: use --preset or give the "
            "sizes",
        ),
        ("import nowhere", "running it raised ModuleNotFoundError: No module named 'nowhere'"),
        ("raise ValueError('two\\nlines')", "running it raised ValueError: two lines"),
        ("import sys; sys.exit(3)", "running it raised SystemExit: 3"),
        ("def", "running it raised SyntaxError: invalid syntax"),
        ("main_config = 3", "main_config is int, not a dict"),
        (
            "main_config = dict(policy=dict(model=dict()))",
            "main_config.policy.model has no world_model_cfg: is it the configuration of a "
            "UniZero policy?",
        ),
        (LIGHTZERO.replace("embed_dim=64", "embed_dim=65"), "2 heads do not divide a width of 65"),
        (LIGHTZERO.replace("num_heads=2", "num_heads=0"), "0 heads do not divide a width of 64"),
    ],
)
def test_foreign_modules(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.py"
    file.write_text(text)
    said = refused(capsys, "--lightzero-config", str(file))
    assert said.startswith(f"cannot use {str(file)!r}: {message}")


def test_what_a_configuration_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.py"
    file.write_text(LIGHTZERO.replace("num_layers=2, ", "").replace("embed_dim=64, ", ""))
    missing = f"{str(file)!r} has no num_layers, embed_dim: give --layers, --head-size"
    assert refused(capsys, "--lightzero-config", str(file)) == missing
    found = figures(capsys, "--lightzero-config", str(file), "--layers", "2", "--head-size", "32")
    assert found["num_pages"] == 224
    file.write_text(LIGHTZERO.replace("num_layers=2", "num_layers='two'"))
    said = "config.py: layers is 'two', allowed is an int from 1 to 2147483647"
    assert refused(capsys, "--lightzero-config", str(file)) == said


# -- transformers


def test_a_transformer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = transformer(tmp_path)
    options = [
        "--simulations",
        "10",
        "--context",
        "1000",
        "--root-tokens",
        "100",
        "--tokens-per-step",
        "32",
    ]
    found = figures(capsys, "--transformers-config", folder, *options)
    assert found["token_bytes"] == 4 * 2 * (64 + 64) * 2
    assert found["unique_tokens"] == 100 + 10 * 32
    # 432 slots for 420 tokens; pages of 32 would leave 6 % empty
    assert found["advised_page_size"] == 16
    assert found["workload"]["envs"] == 1
    assert run("--transformers-config", str(tmp_path / "config.json"), *options) == 0
    printed = capsys.readouterr().out
    assert "LightZero" not in printed
    assert printed.startswith(f"{tmp_path.name}: 4 layers x 2 heads x 64 bfloat16")


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"model_type": "mistral", "sliding_window": 128}, 128),
        ({"sliding_window": 128, "layer_types": ["sliding_attention"] * 4}, 128),
        ({"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2}, None),
        ({"model_type": "mistral", "sliding_window": 128, "use_sliding_window": False}, None),
        ({"sliding_window": 128}, None),
    ],
)
def test_a_window_slides_where_all_layers_do(
    changes: dict[str, Any], context: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = transformer(tmp_path, **changes)
    if context is None:
        said = refused(capsys, "--transformers-config", folder, "--simulations", "3")
        assert said == f"with {folder!r}, give --context, too"
    else:
        found = figures(capsys, "--transformers-config", folder, "--simulations", "3")
        assert found["workload"]["context"] == context


@pytest.mark.parametrize(
    ("changes", "layers", "token_bytes"),
    [
        ({"head_dim": 128}, 4, 4 * 2 * 256 * 2),
        ({"num_key_value_heads": None}, 4, 4 * 8 * 128 * 2),
        ({"torch_dtype": None}, 4, 4 * 2 * 128 * 4),
        ({"torch_dtype": None, "dtype": "float16"}, 4, 4 * 2 * 128 * 2),
        ({"layer_types": ["linear_attention", "full_attention"] * 2}, 2, 2 * 2 * 128 * 2),
    ],
)
def test_what_a_token_takes(
    changes: dict[str, Any],
    layers: int,
    token_bytes: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = transformer(tmp_path, **changes)
    found = figures(
        capsys, "--transformers-config", folder, "--simulations", "3", "--context", "64"
    )
    assert (found["workload"]["layers"], found["token_bytes"]) == (layers, token_bytes)


def test_a_model_of_text_and_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {}, "text_config": LLAMA}))
    found = figures(
        capsys, "--transformers-config", str(tmp_path), "--simulations", "3", "--context", "64"
    )
    assert found["workload"]["layers"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "it holds no JSON object"),
        ("{", "it is no JSON: Expecting property name"),
        ("[" * 100_000, "it is no JSON: "),
        ('{"num_hidden_layers": ' + "9" * 5000 + "}", "it is no JSON: "),
        (json.dumps({**LLAMA, "hidden_size": 511}), "8 heads do not divide a width of 511"),
    ],
)
def test_foreign_json(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    assert refused(capsys, "--transformers-config", str(file)).startswith(
        f"cannot use {str(file)!r}: {message}"
    )


def test_bytes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"\xff\xfe\x00")
    assert "it is no JSON: 'utf-8' codec" in refused(capsys, "--transformers-config", str(file))
    assert "running it raised SyntaxError: " in refused(capsys, "--lightzero-config", str(file))


def test_a_json_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "package.json"
    file.write_text('{"name": "x"}')
    said = refused(capsys, "--transformers-config", str(file), "--simulations", "3")
    assert said == (
        f"{str(file)!r} has no num_hidden_layers, num_attention_heads, head_dim or hidden_size: "
        "give --layers, --heads, --head-size, --context"
    )


@pytest.mark.parametrize("option", ["--lightzero-config", "--transformers-config"])
def test_files_that_are_not_there(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, option, str(tmp_path / "none")).endswith(
        "none': no such file or directory"
    )
    inside = (
        "': is a directory"
        if option == "--lightzero-config"
        else "config.json': no such file or directory"
    )
    assert refused(capsys, option, str(tmp_path)).endswith(inside)
    assert refused(capsys, option, "x" * 5000).endswith("': file name too long")
