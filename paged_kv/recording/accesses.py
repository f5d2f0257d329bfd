"""Which sequences were needed when: kept by a recorder that is asked to, and read from its file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from paged_kv.events import Event
from paged_kv.paged_step import PagedStep
from paged_kv.pages.change import Change, Entry
from paged_kv.pages.records import Record
from paged_kv.recording.figures import Names
from paged_kv.recording.format import Line, Recording
from paged_kv.step import Step

BEGIN = "begin"
OPEN = "open"
HIT = "hit"
END = "end"


class Access(NamedTuple):
    """Sequences that began, were read or ended at one moment, by their numbers in the recording.

    `what`: "begin", "open" (a step was opened on them), "hit" (an index found them; hits of which
    nothing else came between are one) or "end". `parents`: of those that began, the nearest ones
    above that lived then, or None; else empty.
    """

    t: float  # seconds since the recording began
    what: str
    ids: Sequence[int]
    parents: Sequence[int | None] = ()


class AccessLog:
    """What was heard since the last line of a recording.

    The truth is which sequences live: where Ctrl-C came between a change and the word of it, the
    next line says what began or ended meanwhile.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._noted: list[Access] = []
        self._alive: set[int] = set()  # numbers, as of the last line

    def read(self, event: Event) -> None:
        """A verb opened a step, or an index found something."""
        if isinstance(event.result, (Step, PagedStep)):
            self._noted.append(Access(event.end, OPEN, self._numbers(event.result.parents)))
            return
        found = [
            store.target.handle
            for told in event.told
            if told is not None
            for store in told.change.stores
            if store.name == "used" and isinstance(store.target, Entry)
        ]
        if not found:
            return
        last = self._noted[-1] if self._noted else None
        if last is not None and last.what == HIT:
            self._noted[-1] = last._replace(ids=[*last.ids, *self._numbers(found)])
        else:
            self._noted.append(Access(event.end, HIT, self._numbers(found)))

    def change(
        self, at: float, change: Change, live: Mapping[int, Record], joints: Mapping[int, int]
    ) -> None:
        """Sequences begin and end; `live` and `joints` are as before."""
        begun = {seq: record for seq, record in change.puts.items() if seq not in live}
        if begun:
            self._noted.append(self._beginning(at, begun, {*live, *begun}, joints))
        if change.drops:
            self._noted.append(Access(at, END, self._numbers(change.drops)))

    def line(
        self, now: float, origin: float, live: Mapping[int, Record], joints: Mapping[int, int]
    ) -> Line | None:
        """All of it, and what was not told, as a line of a recording; None where nothing was.

        Once it is written, call `forget`.
        """
        numbers = self._names.of(live)
        told = _alive_after(self._alive, self._noted)
        begun = {seq: live[seq] for seq, number in numbers.items() if number not in told}
        ended = sorted(told.difference(numbers.values()))
        if begun:
            self._noted.append(self._beginning(now, begun, live, joints))
        if ended:
            self._noted.append(Access(now, END, ended))
        noted = self._noted
        if not noted:
            return None
        return {
            "kind": "accesses",
            "t": round(now - origin, 6),
            "times": [round(each.t - origin, 6) for each in noted],
            "what": [each.what for each in noted],
            "ids": [list(each.ids) for each in noted],
            "parents": [list(each.parents) for each in noted],
        }

    def forget(self) -> None:
        """Begin anew: a line has all of it."""
        self._alive = _alive_after(self._alive, self._noted)
        self._noted = []

    def _beginning(
        self,
        at: float,
        begun: Mapping[int, Record],
        live: Collection[int],
        joints: Mapping[int, int],
    ) -> Access:
        parents = []
        for *_, parent, _ in begun.values():
            while parent in joints:
                parent = joints[parent]
            parents.append(self._names.number(parent) if parent in live else None)
        return Access(at, BEGIN, self._numbers(begun), parents)

    def _numbers(self, seqs: Collection[int]) -> list[int]:
        return [self._names.number(seq) for seq in seqs]


def _alive_after(before: set[int], noted: Sequence[Access]) -> set[int]:
    """The numbers of what lives once all of this has happened."""
    alive = set(before)
    for each in noted:
        if each.what == BEGIN:
            alive.update(each.ids)
        elif each.what == END:
            alive.difference_update(each.ids)
    return alive


def accesses(recording: Recording) -> Iterator[Access]:
    """What a recording with `accesses=True` kept, in order. Cost: O(what is read of it).

    >>> import tempfile, pathlib
    >>> from paged_kv import PagedKVCache
    >>> from paged_kv.recording import accesses, read_recording, record
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
    >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    >>> with record(cache, path, accesses=True):
    ...     root, = cache.new()
    ...     child, = cache.fork([root])
    ...     cache.release([child])
    >>> [(each.what, each.ids, each.parents) for each in accesses(read_recording(path))]
    [('begin', [1], [None]), ('begin', [2], [1]), ('end', [2], [])]
    """
    for line in recording.accesses:
        yield from map(Access, line["times"], line["what"], line["ids"], line["parents"])
