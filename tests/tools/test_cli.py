"""The command as a whole: help, mistakes, sizes that do not fit, and an early Ctrl-C."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import mistake

import paged_kv
import paged_kv.tools.profile as package
from paged_kv.tools import cli
from paged_kv.tools.commands import common, memory
from paged_kv.tools.profile import PRESETS, client

SHORT = ["profile", "--reference", "--envs", "2", "--simulations", "2", "--roots", "2"]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(
    not FULL.exists(), reason="this system has no file that is always full"
)

# -- help


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    bare = capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    assert bare == capsys.readouterr().out
    for command in cli.COMMANDS:
        assert re.search(rf"^    {command.__name__.rpartition('.')[2]} +\w", bare, re.MULTILINE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"paged-kv {paged_kv.__version__}\n"


@pytest.mark.parametrize("command", ["profile", "estimate", "record", "report", "diff", "snapshot"])
def test_help_of_a_command(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert "None" not in text
    assert "False" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "\nexamples:\n  paged-kv " in text
    assert re.search(
        r"^usage: .*?\n\n[A-Z].*\.\n\n(options|positional arguments):", text, re.DOTALL
    ), "a description"
    assert not re.search(r"--[\w-]+ (?!N\b|NAME\b|PATH\b|FILE)[A-Z]+\b", text), "names of variables"


def test_help_of_profile_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["profile", "--help"])
    text = capsys.readouterr().out
    assert [
        title for title in re.findall(r"^(\w.*):$", text, re.MULTILINE) if title != "options"
    ] == ["what to run", "how", "output", "examples"]
    assert f"{', '.join(PRESETS)} or all (default: cartpole)" in " ".join(text.split())


@pytest.mark.parametrize(("command", "count"), [("profile", 6), ("estimate", 3)])
def test_examples_of_the_help_are_understood(
    command: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = re.sub(r"\\\n +", "", capsys.readouterr().out.partition("examples:\n")[2])
    # what follows is an explanation
    examples = [re.split(r" {2,}", line.strip())[0] for line in text.splitlines()]
    assert len(examples) == count
    for example in examples:
        program, *arguments = example.split()
        assert program == "paged-kv"
        assert cli.parser().parse_args(arguments).run


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from paged_kv.tools import cli\ntry: cli.main(['profile', "
        "'--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'rich', 'tempfile') if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "[]"


# -- mistakes


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["profile", "--preset", "Cartpole"],
            "argument --preset: invalid choice: 'Cartpole', did you mean 'cartpole'? (see "
            "paged-kv profile --help)",
        ),
        (
            ["profile", "--preset", "go"],
            "argument --preset: invalid choice: 'go', choose from cartpole, atari, atari-8l, "
            "long, memory, all (see paged-kv profile --help)",
        ),
        (
            ["estimate", "--preset", "atari8l"],
            "argument --preset: invalid choice: 'atari8l', did you mean 'atari-8l'? (see "
            "paged-kv estimate --help)",
        ),
        (
            ["proflie"],
            "argument COMMAND: invalid choice: 'proflie', did you mean 'profile'? (see paged-kv "
            "--help)",
        ),
        (
            ["profile", "--page_size=3"],
            "unknown argument '--page_size', did you mean '--page-size'? (see paged-kv profile "
            "--help)",
        ),
        (["profile", "cartpole"], "unknown argument 'cartpole' (see paged-kv profile --help)"),
        (
            ["--versoin"],
            "unknown argument '--versoin', did you mean '--version'? (see paged-kv --help)",
        ),
        (
            ["profile", "--seed", "9" * 23],
            f"argument --seed: '{'9' * 23}' is not a whole number of at least 0 and at most "
            "4294967295 (see paged-kv profile --help)",
        ),
        (
            ["profile", "--threads", "99999999999"],
            "argument --threads: '99999999999' is not a whole number of at least 1 "
            "and at most 1024 (see paged-kv profile --help)",
        ),
        (
            ["profile", "--envs", "9" * 5000],
            f"argument --envs: '{'9' * 40}...' is not a whole number of at least 1 (see paged-kv "
            "profile --help)",
        ),
        (
            ["profile", "--json", ""],
            "argument --json: '' is not the name of a file (see paged-kv profile --help)",
        ),
        (
            ["estimate", "--json", ""],
            "argument --json: '' is not the name of a file (see paged-kv estimate --help)",
        ),
        (
            ["profile", "--page-size", "100000000"],
            "page_size is 100000000, allowed is an int from 1 to context = 8",
        ),
        (
            ["profile", "--envs", "9" * 20],
            f"envs is {'9' * 20}, allowed is an int from 1 to 2147483647",
        ),
        (
            ["profile", "--device", "meta"],
            "device 'meta' cannot be used: Cannot copy out of meta tensor; no data!",
        ),
        (["profile", "--json", "x" * 300], f"cannot write to '{'x' * 300}': File name too long"),
        (
            ["profile", "--reference", "--at", "read"],
            "the reference world model has no --at: only the LightZero integration has",
        ),
        (
            ["profile", "--reference", "--window", "exact", "--keys", "node"],
            "the reference world model has no --keys and no --window: only the LightZero "
            "integration has",
        ),
    ],
)
def test_a_mistake_is_answered_with_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mistake(capsys, *arguments) == line


def test_choices_of_a_missing_lightzero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "lightzero_version", lambda: None)
    assert cli.main(["profile", "--keys", "node"]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("paged-kv: the reference world model has no --keys: ")
    )


@pytest.mark.parametrize("number", ["--seed", "--threads"])
def test_the_largest_numbers_are_taken(number: str) -> None:
    largest = {"--seed": str(common.LARGEST_SEED), "--threads": str(common.MOST_THREADS)}[number]
    assert cli.parser().parse_args(["profile", number, largest]).run
    if number == "--seed":
        result = package.profile(envs=1, simulations=1, roots=2, seed=int(largest), reference=True)
        assert result["workload"]["seed"] == int(largest)


# -- memory


@pytest.mark.parametrize(
    "arguments", [["--envs", "1000000000"], ["--reference", "--simulations", "2000000000"]]
)
def test_sizes_beyond_the_machine(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(capsys, "profile", *arguments)
    assert re.fullmatch(
        r"cartpole: the two caches would take [\d.]+ TiB, and [\d.]+ \w+ are there "
        r"\(see paged-kv estimate\)",
        said,
    )


def test_what_is_compared_with_the_memory() -> None:
    result = package.profile("cartpole", envs=2, simulations=4, roots=2, reference=True)["caches"]
    needed = sum(side["kv_bytes_peak"] + side["working_bytes_peak"] for side in result.values())
    sizes: dict[str, int | None] = {"envs": 2, "simulations": 4}
    full = {
        "envs": 2,
        "simulations": 50,
    }  # the ring of nodes has places for 50 at least, and fills in time
    assert memory.too_large("cartpole", sizes, 2, 2**40) is None
    assert memory.too_large("cartpole", sizes, 2, None) is None
    assert memory.too_large("cartpole", sizes, 2, needed - 1) is not None
    assert memory.too_large("cartpole", full, 2, 0) is not None
    there = memory.memory("cpu", torch)
    assert there is None or there > 2**28


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_memory_that_runs_out_after_all(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(name: str, **_: Any) -> None:
        raise error

    monkeypatch.setattr(package, "profile", run_out)
    assert cli.main(["profile", "--reference"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("paged-kv: cartpole: memory ran out: ")


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(package, "profile", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["profile", "--reference"])


# -- the entry


def test_the_entry_is_what_the_package_installs() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'paged-kv = "paged_kv.__main__:main"' in project
    out = subprocess.run(
        [sys.executable, "-m", "paged_kv", "--version"], capture_output=True, text=True, check=True
    )
    assert out.stdout == f"paged-kv {paged_kv.__version__}\n"


def test_the_entry_loads_nothing_before_it_can_be_stopped() -> None:
    code = (
        "import sys; before = set(sys.modules); import paged_kv.__main__; "
        "print(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(paged_kv.__file__).parent.parent)},
    )
    loaded = set(out.stdout.split())
    assert (
        {"paged_kv", "paged_kv.__main__"}
        <= loaded
        <= {
            "__future__",
            "importlib",
            "importlib._bootstrap",
            "importlib._bootstrap_external",
            "paged_kv",
            "paged_kv.__main__",
            "warnings",
            "_warnings",
        }
    )


def test_ctrl_c_during_the_imports_ends_in_one_line() -> None:
    """The interrupt comes out of the first import of the command, whichever that is."""
    code = (
        "import sys, paged_kv.__main__\nclass Interrupted:\n    def find_spec(self, *_): raise "
        "KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\nsys.exit(paged_kv.__main__.main())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "profile"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "paged-kv: stopped, nothing was written.\n"
