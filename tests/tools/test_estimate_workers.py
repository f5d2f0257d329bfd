"""`paged-kv estimate --workers`: worked figures, what is counted of a folder, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import LLAMA, SIZES, figures, refused, run

from paged_kv.errors import BadConfig, BadCount
from paged_kv.tools.estimate import estimate
from paged_kv.tools.estimate.checkpoint import checkpoint
from paged_kv.tools.estimate.machines import FORWARD_BYTES, PROCESS_BYTES, machines

MODEL = 10**9


def save(path: Path, **shapes: list[int]) -> None:
    """The head of a file of weights, as safetensors writes it."""
    tensors = {name: {"dtype": "F32", "shape": shape} for name, shape in shapes.items()}
    head = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head)


def test_cartpole_by_hand() -> None:
    """100 trees on 8 workers: 13 at most, of 28 pages of 2,048 bytes each."""
    whole = estimate(layers=2, heads=2, head_size=32, context=8, envs=100, simulations=25)
    found = machines(whole, 8, 3, model_bytes=MODEL)
    assert (found.trees_of_a_worker, found.num_pages) == (13, 13 * 28)
    assert found.max_bytes == 13 * 28 * 2048
    assert found.workers_of_a_machine == 3
    assert found.worker_bytes == found.max_bytes + found.working_bytes + MODEL + PROCESS_BYTES
    saved = 2800 * (2048 + 8 * 2 + 16)
    assert found.snapshot_bytes == saved
    assert found.store_bytes == 2 * (saved + MODEL)
    assert found.other_store_bytes == 39 * saved // 100 + MODEL
    assert found.machine_bytes == 3 * found.worker_bytes + found.store_bytes + PROCESS_BYTES
    assert found.other_machine_bytes == 3 * found.worker_bytes + found.other_store_bytes


def test_a_language_model_keeps_a_hidden_state_a_node() -> None:
    whole = estimate(
        layers=4,
        heads=8,
        kv_heads=2,
        head_size=64,
        context=4096,
        envs=16,
        simulations=32,
        tokens_per_step=16,
        root_tokens=400,
        dtype="bfloat16",
    )
    found = machines(whole, 4, hidden_size=512)
    assert found.max_bytes == 4 * (25 + 32) * 16 * 2048 + 4 * 33 * 512 * 2
    assert found.working_bytes == FORWARD_BYTES
    assert found.snapshot_bytes == whole.snapshot_bytes + 16 * 33 * 512 * 2
    assert found.model_bytes is None


def test_one_worker_takes_all_and_more_workers_than_trees_one_each() -> None:
    whole = estimate(layers=2, heads=2, head_size=32, context=8, envs=8, simulations=25)
    alone = machines(whole, 1)
    assert alone.max_bytes == whole.num_pages * whole.page_bytes
    assert alone.other_store_bytes == whole.snapshot_bytes
    assert machines(whole, 20).trees_of_a_worker == 1
    for name, value in (("workers", 0), ("machines", 3), ("model_bytes", 0)):
        options = {"workers": 2, name: value}
        with pytest.raises(BadCount, match=name):
            machines(whole, **options)


def test_weights_are_counted_in_the_headers_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": LLAMA}))
    save(tmp_path / "one.safetensors", a=[3, 5], b=[7])
    save(tmp_path / "two.safetensors", c=[])
    assert checkpoint(tmp_path) == (23, 512)
    assert checkpoint(tmp_path / "config.json") == (None, 512)
    (tmp_path / "two.safetensors").write_bytes(b"\x05")
    with pytest.raises(BadConfig, match=r"two\.safetensors"):
        checkpoint(tmp_path)


def test_the_command_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    save(tmp_path / "model.safetensors", a=[1000, 1000])
    sizes = ["--transformers-config", str(tmp_path), "--context", "4096", "--root-tokens", "400"]
    sizes += ["--simulations", "32", "--tokens-per-step", "16", "--envs", "16"]
    found = figures(capsys, *sizes, "--workers", "4", "--machines", "2")["machines"]
    assert found["model_bytes"] == 2_000_000  # bfloat16
    assert run(*sizes, "--workers", "4", "--machines", "2") == 0
    said = capsys.readouterr().out
    assert "4 workers on 2 machines: at most 4 of 16 trees in a worker" in said
    assert f"give max_bytes={found['max_bytes']}" in said
    assert f"give object_store_memory={found['store_bytes']}" in said
    other = figures(capsys, *sizes, "--workers", "4", "--model-bytes", "77")["machines"]
    assert other["model_bytes"] == 77


def test_without_a_model_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SIZES, "--workers", "2") == 0
    assert "Its model is in no sum: give --model-bytes." in capsys.readouterr().out
    assert "machines" not in figures(capsys, *SIZES)


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--machines needs --workers" in refused(capsys, *SIZES, "--machines", "2")
    assert "--model-bytes needs --workers" in refused(capsys, *SIZES, "--model-bytes", "2")
    assert "workers is 0" in refused(capsys, *SIZES, "--workers", "0")
    assert "workers = 2" in refused(capsys, *SIZES, "--workers", "2", "--machines", "3")
