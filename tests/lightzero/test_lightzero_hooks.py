"""How pages learn what LightZero's searches and policies know, whatever else is put around them.

What has to happen before the first import runs in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from lightzero_trees import Searcher, build_model, same
from torch import nn

from paged_kv.errors import BadCount

pytestmark = pytest.mark.lightzero

# A policy whose world model is on pages plays with environments 1 and 3 of four.
PLAY = """
import numpy as np, torch
from paged_kv.tools.profile.client import build_policy
from paged_kv.tools.profile.presets import PRESETS
from paged_kv.tools.profile.side import Setting

def play(policy):
    for time in range(3):
        policy._forward_collect(torch.randn(2, 4), [np.ones(2, np.int8)] * 2, 0.25, [-1] * 2, 0.0,
                                [1, 3], [np.array(time)] * 2)
    wm = policy._collect_model.world_model
    wm.paged.cache.check()
    print([len(pool) for pool in wm.paged.manager.init_pools], wm.hit_count, wm.root_hit_cnt)

policy = build_policy(PRESETS["cartpole"], Setting(4, 4, 0, torch.device("cpu"), 2, "read"))
"""
PLAYED = "[0, 1, 0, 1] 24 4"

WRAP = """
from functools import wraps
from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree
from lzero.policy.unizero import UniZeroPolicy

def wrapped(method):
    {wraps}
    def around(*arguments, **options):
        return method(*arguments, **options)
    return around

UniZeroMCTSCtree.search = wrapped(UniZeroMCTSCtree.search)
UniZeroPolicy._forward_collect = wrapped(UniZeroPolicy._forward_collect)
"""
ATTACH = """
from paged_kv.integrations.lightzero import attach
"""


# Loads LightZero once, and nothing of this package; each line that it reads is code for a child.
SERVER = """
import json, os, sys, tempfile, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import lzero.entry

for line in sys.stdin:
    assert "paged_kv" not in sys.modules
    with tempfile.TemporaryFile("w+") as told:
        child = os.fork()
        if child == 0:
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
            failed = 0
            try:
                exec(json.loads(line), {})
            except BaseException:
                failed = 1
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(failed)
        _, status = os.waitpid(child, 0)
        told.seek(0)
        print(json.dumps([status, told.read()]), file=answers, flush=True)
"""
Run = Callable[..., str]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """The last line that a process of its own prints."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        stdin = server.stdin
        stdout = server.stdout

        def ask(*code: str) -> str:
            print(json.dumps("\n".join(code)), file=stdin, flush=True)
            status, told = json.loads(stdout.readline())
            assert status == 0, told[-3000:]
            return str(told.splitlines()[-1])

        yield ask
        stdin.close()


@pytest.mark.parametrize("wraps", ["@wraps(method)", ""], ids=["wraps", "plain"])
def test_methods_that_others_wrapped(run: Run, wraps: str) -> None:
    """Every root lies under its environment, and every node is found."""
    assert run(PLAY, WRAP.format(wraps=wraps), ATTACH, "play(attach(policy))") == PLAYED


def test_a_policy_whose_method_was_taken_before_it_was_attached(run: Run) -> None:
    """As LightZero's collectors do, which keep the bound methods of a policy."""
    code = "policy.collect = policy._forward_collect\nattach(policy)"
    again = "policy._forward_collect = policy.collect\nplay(policy)"
    assert run(ATTACH, PLAY, code, again) == PLAYED


def test_an_attached_model_arrives_pickled_in_another_process(run: Run, tmp_path: Path) -> None:
    from paged_kv.integrations.lightzero import attach

    model = attach(build_model(rotary=True))
    Searcher(model).search(2)
    file = tmp_path / "model"
    file.write_bytes(cloudpickle.dumps(model))  # LightZero has lambdas in its caches
    code = f"""
import pickle
import numpy as np, torch
from pathlib import Path
from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree
from paged_kv.tools.profile.client import build_policy
from paged_kv.tools.profile.presets import PRESETS
from paged_kv.tools.profile.side import Setting

policy = build_policy(PRESETS["cartpole"], Setting(4, 4, 0, torch.device("cpu"), 2, "read"))
policy._collect_model = pickle.loads(Path({str(file)!r}).read_bytes())
policy._collect_model.world_model.hit_count = policy._collect_model.world_model.root_hit_cnt = 0
"""
    play = PLAY[PLAY.index("def play") : PLAY.index("policy = ")]
    assert run(code, play, "play(policy)") == PLAYED


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A group of one process, as DistributedDataParallel needs."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Any] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compiled": torch.compile,
    "compiled, then distributed": lambda model: nn.parallel.DistributedDataParallel(
        torch.compile(model)
    ),
    "distributed, then compiled": lambda model: torch.compile(
        nn.parallel.DistributedDataParallel(model)
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("inner", [False, True], ids=["model", "world model"])
def test_models_inside_of_wrappers(one_process: None, wrap: Any, inner: bool) -> None:
    from paged_kv.integrations.lightzero import attach
    from paged_kv.integrations.lightzero.release.world_model import PagedWorldModel

    model = build_model(rotary=True)
    wrapped = wrap(model.world_model if inner else model)
    assert attach(wrapped, padding="attended") is wrapped
    assert type(model.world_model) is PagedWorldModel
    own = Searcher(build_model(rotary=True))
    paged = Searcher(model)
    for searcher in (own, paged):
        for _ in range(3):
            searcher.search(4)
    assert same(own, paged)
    attach(wrapped, cache="lightzero")
    assert not hasattr(model.world_model, "paged")


def test_a_search_of_a_compiled_model(run: Run) -> None:
    """LightZero compiles its models where `torch_compile` is set, and searches with them."""
    code = "policy._collect_model = torch.compile(policy._collect_model)\nplay(attach(policy))"
    assert run(PLAY, ATTACH, code) == PLAYED


def test_a_wrapper_without_a_world_model_is_named() -> None:
    from paged_kv.integrations.lightzero import attach

    with pytest.raises(BadCount, match="target is 'DataParallel', allowed is a UniZero world mod"):
        attach(nn.DataParallel(nn.Linear(1, 1)))
