"""Recordings: what a cache did over a run, as a file that a killed run leaves readable.

See docs/recording.md.
"""

from paged_kv.recording.accesses import Access, accesses
from paged_kv.recording.format import Recording, RecordingWriter, header, write_recording
from paged_kv.recording.merging import by_worker, merged, read_recordings
from paged_kv.recording.reading import read_recording
from paged_kv.recording.recorder import Recorder, record

__all__ = [
    "Access",
    "Recorder",
    "Recording",
    "RecordingWriter",
    "accesses",
    "by_worker",
    "header",
    "merged",
    "read_recording",
    "read_recordings",
    "record",
    "write_recording",
]
