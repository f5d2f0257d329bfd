"""Pools of actors of a real Ray, which is started and ended here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from local_ray import local_ray
from tiny_folder import saved

from paged_kv.errors import BadArgument, UnsupportedVersion, WorkerLost
from paged_kv.integrations.huggingface import PagedLM
from paged_kv.integrations.ray import SearchPool
from paged_kv.integrations.ray.worker import Recipe
from paged_kv.recording import read_recordings
from paged_kv.tools import cli
from paged_kv.tools.workers import early

pytestmark = pytest.mark.ray
OPTIONS = {"max_bytes": 10**6}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [3, 4]]


def make_llama() -> Any:
    """A tiny model, made without other files of the tests: actors do not find these."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(20)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        max_position_embeddings=128,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def no_memory() -> Any:
    raise MemoryError("not enough for this model")


@pytest.fixture(scope="module", autouse=True)
def started_ray() -> Iterator[None]:
    with local_ray(4, sys.modules[__name__]):
        yield


@pytest.fixture(scope="module")
def pool(started_ray: None) -> Iterator[SearchPool]:
    """Two workers."""
    with SearchPool(make_llama, 2, options=OPTIONS, cpus=0.5, snapshot_every=4, timeout=10) as made:
        yield made


def grown(tree: Any, trouble: Any = lambda turn: None) -> list[tuple[int, ...]]:
    """What a search draws, with a pool or an lm."""
    level = tree.prefill(PROMPTS, seed=3)
    for turn in range(4):
        trouble(turn)
        level = tree.sample(level[:3] * 2, max_new_tokens=3)
    tree.promote(level[0])
    return [node.tokens for node in level]


def expected() -> list[tuple[int, ...]]:
    return grown(PagedLM(make_llama(), progress=False, **OPTIONS))


def test_results_are_those_of_one_lm(pool: SearchPool) -> None:
    assert grown(pool) == expected()


def test_who_is_killed_or_stopped_is_brought_back(pool: SearchPool) -> None:
    """One dies between calls and one hangs in the middle of a search; both come back."""
    before = pool.stats().restarts

    def trouble(turn: int) -> None:
        first, second = pool.stats().workers
        if turn == 1:
            os.kill(first.pid or 0, signal.SIGKILL)
        if turn == 3:
            os.kill(second.pid or 0, signal.SIGSTOP)  # only a timeout finds it

    assert grown(pool, trouble) == expected()
    assert pool.stats().restarts >= before + 2


def test_the_file_of_who_is_killed_says_so(pool: SearchPool, tmp_path: Path) -> None:
    def trouble(turn: int) -> None:
        if turn == 2:
            os.kill(pool.stats().workers[0].pid or 0, signal.SIGKILL)

    with pool.record(tmp_path, interval=0, budget=None):
        assert grown(pool, trouble) == expected()
    dead, back, other = read_recordings(tmp_path)
    assert (dead.reason, back.reason, other.reason) == (None, "done", "done")
    assert dead.samples
    (said,) = early([dead, back, other])
    assert said.startswith("worker 0: the recording ends early")
    assert "It came back" in said


def test_trees_move_and_weights_change(pool: SearchPool) -> None:
    model = make_llama()
    roots = pool.prefill(PROMPTS, seed=1)
    kids = pool.sample(roots, max_new_tokens=4)
    logits = pool.logits(kids)
    fed = pool.stats().merged.tokens_fed
    for root in roots:
        pool.move(root.tree, 1 - root.worker)
    assert torch.equal(pool.logits(kids), logits)
    assert pool.stats().merged.tokens_fed == fed
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    pool.update(model.state_dict())
    assert pool.stats().merged.pages == 0
    lm = PagedLM(model, progress=False, **OPTIONS)
    others = lm.logits(lm.prefill([kid.tokens for kid in kids]))
    torch.testing.assert_close(pool.logits(kids), others, atol=1e-4, rtol=1e-4)
    pool.update(make_llama().state_dict())


def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ray.md").read_text()
    (block,) = re.findall(r"^```py\n(.*?)^```\n", page, re.MULTILINE | re.DOTALL)
    exec(compile(block, "docs/ray.md", "exec"), {"__name__": "__main__"})


def test_workers_that_cannot_be_made_say_why() -> None:
    with pytest.raises(WorkerLost, match="MemoryError: not enough"):
        SearchPool(no_memory, 1, cpus=0.5)
    lock = threading.Lock()  # which cannot be pickled
    with pytest.raises(BadArgument, match="make_model"):
        SearchPool(lambda: lock, 1)
    with pytest.raises(BadArgument, match="options"):
        SearchPool(make_llama, 1, options={"tokenizer": lock})


def test_an_old_ray_is_refused() -> None:
    from paged_kv.integrations.ray.cluster import check_version

    check_version("2.60.0")
    check_version("3.0.0rc1")
    check_version("2.60rc1")
    for old in ("1.13.0", "2.9.3"):
        with pytest.raises(UnsupportedVersion, match=old):
            check_version(old)


def test_without_ray_it_is_said_what_to_install() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from paged_kv.integrations.ray import Placement, SearchPool\n"
        "try: SearchPool(print, 1)\n"
        "except ImportError as error: print(type(error).__name__, error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("MissingPackage a pool of workers needs ray")
    assert "paged-kv[ray]" in out.stdout


def test_processors_may_be_functions_without_a_name(pool: SearchPool) -> None:
    (root,) = pool.prefill([[5, 6, 7]])
    (kid,) = pool.sample(
        [root], max_new_tokens=2, logits_processor=[lambda ids, scores: scores - 9 * (scores < 0)]
    )
    assert len(kid.new_tokens) == 2


def test_processors_that_ray_does_not_have_are_told_of() -> None:
    from paged_kv.integrations.ray.cluster import RayEngine

    recipe = Recipe(make_llama, OPTIONS, 1, 1)
    with pytest.warns(RuntimeWarning, match="ask for 100 CPU"):
        RayEngine(recipe, cpus=100, gpus=0).close()
    for cpus, gpus in (("1", 0), (True, 0), (-1, 0), (1, float("inf")), (1, None)):
        with pytest.raises(BadArgument, match=r"cpus|gpus"):
            RayEngine(recipe, cpus=cpus, gpus=gpus)  # type: ignore[arg-type]


ALONE = """
import ray
from paged_kv.errors import ClosedPool
from paged_kv.integrations.ray import SearchPool
from test_ray import OPTIONS, make_llama

with SearchPool(make_llama, 1, options=OPTIONS) as pool:
    with SearchPool(make_llama, 1, options=OPTIONS):  # which does not end Ray
        pass
    roots = pool.prefill([[5, 6]])
    print(pool.stats().workers[0].pid, flush=True)
    ray.shutdown()
    try:
        pool.logits(roots)
    except ClosedPool:
        assert not ray.is_initialized()
        raise SystemExit(3)
"""


def test_a_pool_that_started_ray_leaves_nothing_running() -> None:
    folder = Path(__file__).parent
    given = filter(None, [os.environ.get("PYTHONPATH")])
    places = [str(folder), str(folder.parent / "support"), *given]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 3, done.stderr
    pid = int(done.stdout.split()[0])
    patience = time.monotonic() + 20
    while psutil.pid_exists(pid) and time.monotonic() < patience:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)


def test_the_command_searches_many_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "tiny", max_position_embeddings=512)
    sizes = ["--prompt-tokens", "60", "--simulations", "2", "--width", "2", "--tokens", "4"]
    many = ["--workers", "1", "--searches", "3", "--json", str(tmp_path / "out.json")]
    many += ["--record", str(tmp_path / "recorded")]
    assert cli.main(["search", "--model", str(folder), *sizes, *many]) == 0
    assert "3 searches of tiny on 1 worker" in capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["nodes"], result["tokens"], len(result["texts"])) == (12, 48, 3)
    assert [worker["calls"] for worker in result["workers"]] == [3]
    assert [each.reason for each in read_recordings(tmp_path / "recorded")] == ["done"]
