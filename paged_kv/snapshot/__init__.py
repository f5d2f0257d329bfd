"""Sequences in files: what was saved is loaded whole, or refused. See docs/snapshots.md."""

from paged_kv.snapshot.loading import Snapshot, load
from paged_kv.snapshot.saving import Saved, save, save_bundle

__all__ = ["Saved", "Snapshot", "load", "save", "save_bundle"]
