"""`paged-kv estimate`: where the sizes come from, what is printed, and what is said of sizes that
cannot be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paged_kv.tools import cli
from paged_kv.tools.commands.profile import PRESET_NAMES

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


# -- what is printed


def test_a_table_of_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SIZES) == 0
    title, _, release, main, dense, unique, pages, older, advice = (
        capsys.readouterr().out.splitlines()
    )
    assert title == (
        "search: 2 layers x 8 heads x 96 float32 (12.0 KiB a token), 8 environments, 50 "
        "simulations, "
        "roots of 5 tokens, context 8"
    )
    assert "39.8 MiB      4.04x  960.0 KiB" in release
    assert "230.2 MiB     23.39x  960.0 KiB" in main
    assert "38.2 MiB      3.89x  768.0 KiB" in dense
    assert unique.startswith("unique tokens: 840 ")
    assert pages.startswith("pages of 2 tokens: 424 ")
    assert older.startswith("  on LightZero main, with 255 older roots an environment: 2,464 ")
    assert advice.startswith(
        "Choose page_size=2, num_pages=424: the 2 tokens of a step fill whole pages"
    )


def test_presets_and_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    assert run("--preset", "all", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert [result["name"] for result in json.loads(file.read_text())] == list(PRESET_NAMES)
    assert all(f"{name}: " in printed for name in PRESET_NAMES)


def test_options_win_over_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(
        capsys,
        "--preset",
        "cartpole",
        "--simulations",
        "10",
        "--dtype",
        "bfloat16",
        "--root-steps",
        "2",
    )
    assert (found["name"], found["token_bytes"]) == ("cartpole", 512)
    assert found["root_tokens"] == 3
    assert found["unique_tokens"] == 8 * (3 + 2 * 10)
    assert found["lightzero"]["kv"] == 8 * (2 + 20 + 1) * 8 * 512


def test_pages_that_depend_on_the_tree_are_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SIZES, "--page-size", "3") == 0
    assert "pages of 3 tokens: about 552 (416 to 816)" in capsys.readouterr().out


def test_the_answer_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from paged_kv.tools import cli; status = cli.main(sys.argv[1:]);"
        "print(status, [name for name in ('torch', 'numpy', 'rich', 'sortedcontainers') if name "
        "in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, "estimate", *SIZES], capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_went_away(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "paged_kv.tools.cli", "estimate", *SIZES]
    ended = subprocess.run(
        command,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


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
        (
            {"qk_nope_head_dim": 96, "qk_rope_head_dim": 32, "v_head_dim": 96},
            4,
            4 * 2 * (128 + 96) * 2,
        ),
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


# -- sizes that cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "0"], "heads is 0, allowed is an int from 1 to 2147483647"),
        (["--layers", "-2"], "layers is -2, allowed is an int from 1 to 2147483647"),
        (["--simulations", "0"], "simulations is 0, allowed is an int from 1 to 2147483647"),
        (["--kv-heads", "3"], "kv_heads is 3, allowed is a divisor of heads = 8"),
        (["--context", "2"], "context is 2, allowed is an int from 3 to 2147483647"),
        (["--page-size", "9"], "page_size is 9, allowed is an int from 1 to context = 8"),
        (["--page-size", "0"], "page_size is 0, allowed is an int from 1 to context = 8"),
        (
            ["--context", "999", "--page-size", "257"],
            "page_size is 257, allowed is an int from 1 to 256",
        ),
        (
            ["--tokens-per-step", "8"],
            "tokens_per_step is 8, allowed is an int from 1 to context - 1 = 7",
        ),
        (["--root-tokens", "8"], "root_tokens is 8, allowed is an int from 1 to context - 1 = 7"),
        (["--root-steps", "0"], "root_steps is 0, allowed is an int from 1 to 2147483647"),
        (
            ["--dtype", "int8"],
            "the cache has dtype 'int8', expected float64, float32, float16, bfloat16, "
            "float8_e4m3fn, float8_e5m2",
        ),
        (["--envs", "9" * 30], f"envs is {'9' * 30}, allowed is an int from 1 to 2147483647"),
        (["--json", "/nowhere/at/all"], "cannot write to '/nowhere/at/all': no such directory"),
    ],
)
def test_impossible_sizes(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, *SIZES, *arguments) == message


def test_the_preset_that_does_not_fit_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--preset", "all", "--page-size", "9")
    assert said == "cartpole: page_size is 9, allowed is an int from 1 to context = 8"


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="this system has no file that is always full"
)
def test_a_file_that_takes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SIZES, "--json", "/dev/full") == 1
    assert (
        capsys.readouterr().err
        == "paged-kv: cannot write to '/dev/full': No space left on device\n"
    )


def test_totals_that_no_tensor_can_hold(capsys: pytest.CaptureFixture[str]) -> None:
    largest = str(2**31 - 1)
    sizes = [part for name in SIZES[::2] for part in (name, largest)]
    assert refused(capsys, *sizes).startswith("the total of bytes is ")


def test_sizes_that_were_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *SIZES[:6]) == (
        "give --context, --envs, --simulations, or one of --preset, --lightzero-config, "
        "--transformers-config"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "two"], "argument --heads: 'two' is not a whole number"),
        (["--heads", "9" * 5000], f"argument --heads: '{'9' * 40}...' is not a whole number"),
        (["--preset", "pong"], "argument --preset: invalid choice: 'pong'"),
        (["--preset", "long", "--transformers-config", "x"], "not allowed with argument --preset"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
