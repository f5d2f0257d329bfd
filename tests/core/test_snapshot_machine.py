"""Snapshots against the dense oracle, saved one after another into one folder, in random orders of
all verbs.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from bundle_machine import BundleMachine
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from paged_kv.bundles.bundle import Bundle
from paged_kv.snapshot import Snapshot, save


class SnapshotMachine(BundleMachine):
    """As `BundleMachine`, but bundles go by a folder."""

    def send(self, seqs: list[int], data: Any) -> Bundle:
        if not hasattr(self, "folder"):
            self.folder = Path(tempfile.mkdtemp())
        saved = save(self.folder, self.cache, seqs, data=data, sync=False)
        with Snapshot(self.folder) as snapshot:
            snapshot.verify()
            found = Bundle.of(snapshot)
        bundle = self.cache.export(seqs, data=data)
        assert found.data() == bundle.data()
        assert (found.records == bundle.records).all()
        assert (found.positions == bundle.positions).all()
        for ours, theirs in zip(bundle.contents.tables, found.contents.tables, strict=True):
            assert (ours == theirs).all()
        assert saved.pages == len(bundle.records)
        return found

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


def test_snapshots_agree_with_the_oracle(device: str) -> None:
    machine = type("Machine", (SnapshotMachine,), {"device": device})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=100, stateful_step_count=25, deadline=None)
    )
