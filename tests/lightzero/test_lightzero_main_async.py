"""The asynchronous entry of LightZero's main, whose actors of Ray collect and evaluate on pages.

Runs where PAGED_KV_LIGHTZERO_MAIN names a checkout of LightZero's main.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if not os.environ.get("PAGED_KV_LIGHTZERO_MAIN"):
    pytest.skip(
        "not run: PAGED_KV_LIGHTZERO_MAIN names no checkout of LightZero's main",
        allow_module_level=True,
    )


def test_actors_collect_and_evaluate_on_pages(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(tests / "support" / "lightzero_async_run.py"), str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(tests / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    calls = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    last = {call["pid"]: call for call in calls}
    kinds = sorted(call["kind"] for call in last.values())
    assert kinds == ["MuZeroEvaluator", "MuZeroSegmentCollector", "MuZeroSegmentCollector"]
    for call in last.values():
        assert call["class"] == "PagedMainWorldModel"
        assert call["hits"] > 10
        assert call["pages_allocated"] > call["hits"]
        assert call["old_used"] == 0
