"""`paged-kv estimate`: what is printed, and what is said of sizes that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import SIZES, figures, refused, run

from paged_kv.tools.commands.profile import PRESET_NAMES

# -- what is printed


def test_a_table_of_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SIZES) == 0
    title, _, release, main, dense, unique, pages, older, advice, snapshot = (
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
    assert snapshot == "A snapshot of its pages takes 10.0 MiB."


def test_pages_of_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """96 numbers of float32 in 98 bytes; everything else is as wide as before."""
    exact = figures(capsys, *SIZES)
    small = figures(capsys, *SIZES, "--storage", "int8")
    assert small["paged"]["kv"] * 4 * 96 == exact["paged"]["kv"] * 98
    assert small["page_bytes"] * 4 * 96 == exact["page_bytes"] * 98
    for name in ("dense", "lightzero", "token_bytes", "unique_bytes", "num_pages"):
        assert small[name] == exact[name]
    assert run(*SIZES, "--storage", "int8") == 0
    assert "int8 pages of 2 tokens: 424 " in capsys.readouterr().out
    wrong = refused(capsys, *SIZES, "--storage", "int4")
    assert "storage is 'int4'" in wrong


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
    assert "pages of 3 tokens: about 416 (280 to 808)" in capsys.readouterr().out


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
