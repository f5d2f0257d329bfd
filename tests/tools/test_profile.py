"""`paged-kv profile`: what it counts, what it compares, what it prints and writes."""

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
import torch
from rich.console import Console

import paged_kv.tools.profile as package
from paged_kv.tools import cli
from paged_kv.tools.profile import client, profile, table
from paged_kv.tools.profile.counters import (
    CACHE,
    LAYER,
    MODEL,
    REST,
    HostCopyCounter,
    KernelCounter,
    Probe,
    Probes,
    Regions,
    storage_bytes,
    wrap_overhead,
)
from paged_kv.tools.profile.presets import PRESETS
from paged_kv.tools.profile.workload import ENOUGH_ROOTS, count_ticks
from paged_kv.tools.reference.contexts import ROOT, DenseContexts, PagedContexts

SIDE_KEYS = {
    "kv_bytes_peak",
    "kv_bytes_end",
    "unique_token_bytes_peak",
    "working_bytes_peak",
    "tensor_kernels_per_simulation",
    "host_copies_per_simulation",
    "cache_us_per_simulation",
    "search_us_per_simulation",
    "lookups",
    "hits",
    "misses",
}
KEYS = {
    "machine": set(),
    "workload": {
        "preset",
        "client",
        "client_version",
        "envs",
        "simulations",
        "roots",
        "layers",
        "context_length",
        "seed",
        "threads",
        "at",
        "keys",
    },
    "ratios": {
        "kv_bytes_peak",
        "kv_bytes_over_unique",
        "tensor_kernels",
        "cache_time",
        "search_time",
    },
    "fidelity": {
        "actions_compared",
        "actions_equal",
        "visit_counts_equal",
        "max_abs_value_difference",
    },
}


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """A short run on the reference world model."""
    return profile("cartpole", envs=3, simulations=6, roots=4, reference=True)


def check_keys(result: dict[str, Any]) -> None:
    """All the keys that the format promises."""
    assert result["schema"] == 2
    for part, keys in KEYS.items():
        assert keys <= set(result[part])
    assert set(result["caches"]["dense"]) >= SIDE_KEYS
    more = {"pool_bytes_reserved", "sharing_ratio_peak", "copied_pages", "evictions"}
    assert set(result["caches"]["paged"]) >= SIDE_KEYS | more
    assert json.loads(json.dumps(result)) == result


def check_paged_side(result: dict[str, Any]) -> None:
    """What must hold for every workload."""
    paged = result["caches"]["paged"]
    dense = result["caches"]["dense"]
    assert result["fidelity"]["actions_equal"] == result["fidelity"]["actions_compared"] > 0
    assert result["fidelity"]["visit_counts_equal"]
    assert result["ratios"]["kv_bytes_over_unique"] <= 1.1
    assert paged["kv_bytes_peak"] < dense["kv_bytes_peak"]
    assert 0 < paged["tensor_kernels_per_simulation"] <= 6 < dense["tensor_kernels_per_simulation"]
    assert paged["host_copies_per_simulation"] <= 1.5
    assert paged["lookups"] == paged["hits"] + paged["misses"] == dense["lookups"] > 0
    for side in (paged, dense):
        assert side["cache_us_per_simulation"] > 0
        # by construction: both are of the same root steps
        assert 0 < side["cache_share_of_search"] < 1


# -- counters


def test_kernels_are_counted_and_views_and_allocations_are_not() -> None:
    regions = Regions()
    regions.now = CACHE
    x = torch.ones(4, 4)
    with KernelCounter(regions) as kernels:
        view = x[1:, :2].transpose(0, 1).unsqueeze(0).detach()
        torch.empty(3)
        torch.empty_like(x)
        assert kernels.counts[CACHE] == 0
        view.add_(1)
        torch.stack([x, x])
        x[0].copy_(x[1])
        x.index_select(0, torch.zeros(1, dtype=torch.long))
    assert kernels.counts[CACHE] == 5  # `zeros` fills, so it counts


def test_host_copies_are_counted_once_each() -> None:
    regions = Regions()
    x = torch.ones(2)
    with HostCopyCounter(regions) as copies:
        x.cpu().numpy()
        x.numpy()
        x[0].item()
        x.tolist()
        x.to("cpu")
        x.to(torch.float64)
        x.sum()
    assert copies.counts[REST] == 5


def test_a_region_suspends_the_one_around_it() -> None:
    regions = Regions()
    model = regions.wrap(lambda: time.sleep(0.02), MODEL)
    cache = regions.wrap(model, CACHE)
    twice = regions.wrap(cache, CACHE)
    twice()
    assert regions.calls == {CACHE: 1, MODEL: 1}
    assert regions.seconds[MODEL] >= 0.02 > 10 * regions.seconds[CACHE]
    assert regions.now == REST
    regions.reset()
    assert not regions.seconds


def test_a_region_ends_when_its_function_raises() -> None:
    regions = Regions()
    with pytest.raises(ZeroDivisionError):
        regions.wrap(lambda: 1 / 0, CACHE)()
    assert regions.now == REST
    assert wrap_overhead(100) < 1e-4


def test_probes_leave_no_trace() -> None:
    class Owner:
        def method(self) -> int:
            return 1

    owner = Owner()
    original = vars(Owner)["method"]
    probes = [Probe(owner, "method", CACHE), Probe(Owner, "method", LAYER)]
    with Probes(probes, Regions()) as regions:
        assert owner.method() == Owner().method() == 1
        assert regions.calls == {CACHE: 1, LAYER: 1}
    assert vars(owner) == {}
    assert vars(Owner)["method"] is original


def test_storage_bytes_count_a_storage_once() -> None:
    x = torch.zeros(8)
    assert storage_bytes([x, x[2:], x.view(2, 4), torch.zeros(2)]) == 40


# -- the reference world model


def test_both_reference_contexts_read_back_alike() -> None:
    torch.manual_seed(0)
    shape = (2, 2, 4, 8, 3)
    dense = DenseContexts(*shape)
    paged = PagedContexts(*shape)
    for step in range(9):
        batches = [
            contexts.open([ROOT if step < 5 else step - 6] * 3) for contexts in (dense, paged)
        ]
        new = torch.randn(2, 2, 3, 2, 1 if step == 0 else 2, 4)
        for layer in range(2):
            for batch in batches:
                batch.update(layer, *new[layer])
            for first, second in zip(*(batch.get(layer) for batch in batches), strict=True):
                assert torch.equal(first, second)
        for contexts in (dense, paged):
            contexts.store(ROOT if step < 5 else step - 5)
        assert dense.root_tokens() == paged.root_tokens()
    assert (dense.lookups, dense.hits) == (paged.lookups, paged.hits) == (27, 24)
    paged.forget_nodes()
    dense.forget_nodes()
    paged.cache.check()
    assert paged.cache.live_sequences == 3


def test_reference_profile(small: dict[str, Any]) -> None:
    check_keys(small)
    check_paged_side(small)
    assert small["fidelity"]["max_abs_value_difference"] == 0
    assert small["workload"]["client"] == "reference"


def test_reference_profile_repeats() -> None:
    first, second = (
        profile("cartpole", envs=2, simulations=3, roots=2, seed=5, reference=True)
        for _ in range(2)
    )
    assert first["fidelity"] == second["fidelity"]
    assert first["caches"]["paged"]["kv_bytes_peak"] == second["caches"]["paged"]["kv_bytes_peak"]


def test_every_root_step_ticks() -> None:
    seen: list[tuple[str, int, int]] = []
    profile(
        "cartpole",
        envs=2,
        simulations=2,
        roots=3,
        reference=True,
        on_tick=lambda *tick: seen.append(tick),
    )
    assert [done for _, done, _ in seen] == list(range(1, count_ticks(PRESETS["cartpole"], 3) + 1))
    assert {stage for stage, _, _ in seen} == {"timing", "counting"}


# -- LightZero


@pytest.mark.lightzero
def test_ties_are_fixed_and_freed_again() -> None:
    from paged_kv.tools.profile.ties import fixed_ties

    file = client.tree_file()
    from lzero.mcts.ctree.ctree_muzero import mz_tree

    def first_action() -> int:
        roots = mz_tree.Roots(1, [list(range(6))])
        roots.prepare_no_noise([0.0], [[0.0] * 6], [-1])
        bounds = mz_tree.MinMaxStatsList(1)
        results = mz_tree.ResultsWrapper(num=1)
        bounds.set_delta(0.01)
        return int(mz_tree.batch_traverse(roots, 19652, 1.25, 0.99, bounds, results, [-1])[2][0])

    with fixed_ties(file) as fixed:
        assert fixed
        assert len({first_action() for _ in range(40)}) == 1
    assert len({first_action() for _ in range(40)}) > 1


def test_ties_of_a_file_without_the_link_stay() -> None:
    from paged_kv.tools.profile.ties import fixed_ties

    with fixed_ties(__file__) as fixed:
        assert not fixed


@pytest.mark.lightzero
def test_cartpole_profile() -> None:
    result = profile("cartpole", simulations=10, roots=6)
    check_keys(result)
    check_paged_side(result)
    assert result["fidelity"]["max_abs_value_difference"] < 1e-5
    workload = result["workload"]
    assert (workload["client"], workload["client_version"]) == ("lightzero", "0.2.0")
    assert (workload["weights"], workload["tie_breaking"]) == ("trained", "fixed")
    assert (workload["layers"], workload["context_length"], workload["envs"]) == (2, 8, 8)


@pytest.mark.lightzero
def test_learned_positions_profile() -> None:
    result = profile("atari", envs=2, simulations=4, roots=2)
    check_keys(result)
    check_paged_side(result)
    assert result["workload"]["weights"] == "random"


# -- the command


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
    assert not {"at", "keys", "window"} & set(given)
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
    assert lines["K/V held, peak"][2].strip()
    remark = f"Too few root steps to compare times: {roots}, of which"
    assert (remark in shown(changed)) == ("Give --roots 6 or more" in shown(changed)) == few


def test_every_preset_times_enough() -> None:
    assert all(preset.roots >= ENOUGH_ROOTS for preset in PRESETS.values())


def test_the_note_says_what_applies(small: dict[str, Any]) -> None:
    choices = 'at="read", keys="node", window="cached"'
    assert choices not in shown(small)
    assert "at=" not in shown(small)
    changed = json.loads(json.dumps(small))
    changed["workload"]["client"] = "lightzero"
    assert choices in shown(changed)
