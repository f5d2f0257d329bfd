"""Recordings: what a cache did over a run, as a file that a killed run leaves readable.

See docs/recording.md.
"""

from paged_kv.recording.accesses import Access, accesses
from paged_kv.recording.format import Recording, RecordingWriter, header
from paged_kv.recording.reading import read_recording
from paged_kv.recording.recorder import Recorder, record

__all__ = [
    "Access",
    "Recorder",
    "Recording",
    "RecordingWriter",
    "accesses",
    "header",
    "read_recording",
    "record",
]
