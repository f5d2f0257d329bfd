"""`paged-kv profile`: its arguments, its table and its JSON."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from profile_format import check_keys
from rich.console import Console

import paged_kv.tools.profile as package
from paged_kv.attention import in_pages
from paged_kv.tools import cli
from paged_kv.tools.profile import client, profile, table
from paged_kv.tools.profile.parts import divided
from paged_kv.tools.profile.presets import PRESETS
from paged_kv.tools.profile.workload import ENOUGH_ROOTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "--envs", "0"], "argument --envs: '0' is not a whole number of at least 1"),
        (["profile", "--roots", "1"], "argument --roots: '1' is not a whole number of at least 2"),
        (["profile", "--seed", "x"], "argument --seed: 'x' is not a whole number of at least 0"),
        (["profile", "--keys", "row"], "argument --keys: invalid choice: 'row'"),
        (["profile", "--preset", "pong"], "argument --preset: invalid choice: 'pong'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_unusable_device_and_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["profile", "--device", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("paged-kv: device 'nowhere' cannot be used: ")
    assert cli.main(["profile", "--json", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"paged-kv: cannot write to {str(tmp_path)!r}: it is a directory\n"
    )
    assert cli.main(["profile", "--json", str(tmp_path / "no" / "file")]) == 2
    assert capsys.readouterr().err.endswith("file': no such directory\n")


def test_pages_that_cannot_be_attended_to_are_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(in_pages, "loop", lambda: None)
    monkeypatch.setattr("paged_kv.tools.profile.client.lightzero_version", lambda: "0.2.0")
    assert cli.main(["profile", "--attention", "pages"]) == 1
    said = capsys.readouterr().err
    assert "attention is 'pages', allowed is 'gathered', since numba is not installed" in said


def test_command_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    arguments = [
        "profile",
        "--reference",
        "--envs",
        "2",
        "--simulations",
        "3",
        "--roots",
        "2",
        "--json",
        str(file),
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 layers x 64, context 8, 2 envs, 3 simulations" in printed
    # four root steps of warm-up, two timed, two envs
    assert "Actions equal: 12 of 12; visit counts equal" in printed
    check_keys(json.loads(file.read_text()))


@pytest.mark.parametrize("keys", ["node", "latent"])
def test_the_choice_of_keys_arrives(
    keys: str,
    small: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(package, "profile", lambda name, **options: given.update(options) or small)
    monkeypatch.setattr(client, "lightzero_version", lambda: "0.2.0")
    assert cli.main(["profile", "--keys", keys]) == 0
    assert given["keys"] == keys


def test_choices_that_were_not_made_are_those_of_the_function(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(package, "profile", lambda name, **options: given.update(options) or small)
    assert cli.main(["profile", "--reference"]) == 0
    assert given["reference"]
    assert not {"at", "keys", "window", "step", "linears", "attention", "storage", "compile"} & set(
        given
    )
    assert small["workload"]["keys"] == "node"


@pytest.mark.lightzero
@pytest.mark.parametrize("keys", ["node", "latent"])
def test_both_kinds_of_keys_decide_alike(keys: str) -> None:
    result = profile("cartpole", envs=2, simulations=6, roots=3, keys=keys)
    assert result["workload"]["keys"] == keys
    assert result["fidelity"]["actions_equal"] == result["fidelity"]["actions_compared"] > 0
    assert result["fidelity"]["visit_counts_equal"]


def test_all_presets_make_a_list(
    tmp_path: Path,
    small: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names: list[str] = []
    monkeypatch.setattr(package, "profile", lambda name, **_: names.append(name) or small)
    file = tmp_path / "all.json"
    assert cli.main(["profile", "--reference", "--preset", "all", "--json", str(file)]) == 0
    assert names == list(PRESETS)
    assert json.loads(file.read_text()) == [small] * 5


def test_missing_lightzero_is_said(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "lightzero_version", lambda: None)
    monkeypatch.setattr(
        package, "profile", lambda name, **given: small if given["reference"] else None
    )
    assert cli.main(["profile"]) == 0
    said = "paged-kv: LightZero is not installed; running the reference world model instead.\n"
    assert capsys.readouterr().err == said


def test_interrupt_ends_in_one_line() -> None:
    started = (
        "import sys; from paged_kv import __main__; print('ready', flush=True); "
        "sys.exit(__main__.main())"
    )
    command = [sys.executable, "-c", started, "profile", "--reference", "--roots", "100000"]
    # A shell starts background jobs with interrupts ignored, and so would be all that they start.
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        time.sleep(3)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert (out, err) == ("", "paged-kv: stopped, nothing was written.\n")


def shown(result: dict[str, Any]) -> str:
    """A result as the terminal shows it."""
    console = Console(record=True, width=200, file=io.StringIO())
    table.show([result], console)
    return console.export_text()


def test_the_table_marks_what_differs(small: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(small))
    changed["fidelity"].update(visit_counts_equal=False, actions_equal=1)
    changed["workload"]["tie_breaking"] = "clock"
    text = shown(changed)
    assert "visit counts DIFFER" in text
    assert "Tie-breaking could not be fixed here" in text


@pytest.mark.parametrize("roots", [2, 5, 6, 100])
def test_times_of_few_root_steps_are_not_compared(roots: int, small: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(small))
    changed["workload"]["roots"] = roots
    for side, cache, search in (("dense", 300.0, 1000.0), ("paged", 100.0, 500.0)):
        changed["caches"][side].update(
            cache_us_per_simulation=cache,
            search_us_per_simulation=search,
            cache_share_of_search=0.25,
            search_parts_us_per_simulation=divided(search, search / 4, {"model": 2, "tree": 1}),
        )
    lines = {
        line.split("│")[1].strip(): line.split("│")[2:5]
        for line in shown(changed).splitlines()
        if "│" in line
    }
    few = roots < 6
    assert lines["Search time / simulation"][2].strip() == ("" if few else "2.0x")
    assert lines["Cache time / simulation"][2].strip() == ("" if few else "3.0x")
    assert lines["the cache's share"][0].strip() == ("" if few else "25.0 %")
    names = ["the model's blocks", "the tree", "the cache"]
    assert [name in lines for name in names] == [not few] * 3
    if not few:
        assert [lines[name][0].strip() for name in names] == ["500 us", "250 us", "250 us"]
        assert [lines[name][2].strip() for name in names] == ["2.0x"] * 3
    assert lines["K/V held, peak"][2].strip()
    remark = f"Too few root steps to compare times: {roots}, of which"
    assert (remark in shown(changed)) == ("Give --roots 6 or more" in shown(changed)) == few


def test_every_preset_times_enough() -> None:
    assert all(preset.roots >= ENOUGH_ROOTS for preset in PRESETS.values())


def test_the_note_says_what_applies(small: dict[str, Any]) -> None:
    choices = 'Measured with at="read", keys="node", padding="attended", window="cached", step='
    assert choices not in shown(small)
    assert "at=" not in shown(small)
    changed = json.loads(json.dumps(small))
    changed["workload"]["client"] = "lightzero"
    assert choices in " ".join(shown(changed).split())
    changed["workload"].update(padding="masked", window="exact")
    said = " ".join(shown(changed).split())
    assert (
        'padding="masked", window="exact", step="lean", linears="torch", attention="gathered". '
        in said
    )
    changed["workload"].update(linears="packed", attention="pages", storage="int8", compile=True)
    said = " ".join(shown(changed).split())
    assert 'linears="packed", attention="pages", storage="int8", compile=True. ' in said
