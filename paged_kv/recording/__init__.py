"""Recordings: what a cache did over a run, as a file that a killed run leaves readable. See docs/recording.md."""

from paged_kv.recording.format import Recording, RecordingWriter, header, read_recording

__all__ = ["Recording", "RecordingWriter", "header", "read_recording"]
