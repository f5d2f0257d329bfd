"""Who hangs below whom. No tensors in here.

Each sequence names its parent; this keeps the other direction, so that what is done to a subtree
costs what the subtree holds. A parent that was released while two branches hang below it stays as a
joint, which holds them together; with one branch or none it is taken out. So joints are fewer than
leaves, and a million steps of "child = step(parent); release(parent)" leave memory flat.

A tree begins where `new` or `fork(..., root=True)` made its top. Parents of sequences and of joints
are the truth; the links follow from them, and are made when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter

from paged_kv.pages.change import Splice
from paged_kv.pages.records import NO_PARENT, Links, Record

MANY = 64  # sequences of one batch that are linked at once
WAITING = 256  # batches that are linked at the latest
STALE = 4096  # links to sequences that have ended, beside as many as live twice over
SPARSE = 16  # such links below one parent, beside as many as live twice over
PARENT = itemgetter(3)


class Tree:
    """The links among the sequences of `live`, and the joints between them.

    >>> live = {seq: ((), 0, 0, parent, 0) for seq, parent in ((1, 0), (2, 1), (3, 1), (4, 3))}
    >>> tree = Tree(live)
    >>> tree.begin(live)
    >>> tree.children(1), tree.below([3]), tree.parent(4), tree.rivals(2)
    ([2, 3], [3, 4], 3, [3, 4])
    """

    def __init__(self, live: Mapping[int, Record]) -> None:
        self.joints: dict[int, int] = {}  # with their parents
        self._live = live
        # Parent -> its only child, or all of them. Those that have ended are passed over.
        self._links: Links = {}
        self._grafts: list[Callable[[], Links]] = []  # which come before all that is unlinked
        self._unlinked: list[Mapping[int, Record]] = []
        self._noted = 0  # of them, whose parents are in the set
        self._parents: set[int] = set()  # all that have something below them, or had it
        self._stale = 0
        # Sequence -> who waits for its end, and the lists to tell it in.
        self.watches: dict[int, dict[int, list[int]]] = {}

    # -- links

    def begin(self, made: Mapping[int, Record]) -> None:
        """Sequences came to be below the parents that their records name."""
        self._unlinked.append(made)
        if len(made) >= MANY or len(self._unlinked) >= WAITING:
            self._link_all()

    def graft(self, links: Callable[[], Links]) -> None:
        """Whole trees came to be, of sequences that are new here; `links` says how, when asked."""
        self._grafts.append(links)

    def end(self, seqs: Sequence[int]) -> None:
        """Sequences have ended; the joints among them are known already."""
        if not self.watches.keys().isdisjoint(seqs):
            self.wake(seqs)
        if not self._all_parents().isdisjoint(seqs):
            gone = [seq for seq in seqs if seq not in self.joints]
            self._parents.difference_update(gone)
            for seq in gone:
                self._links.pop(seq, None)
        self._stale += len(seqs)
        if self._stale > STALE + 2 * len(self._live):
            self.rebuild()

    def take_out(self, splices: Sequence[Splice]) -> None:
        """Hang what hangs below joints on what is above them."""
        for joint, parent, children in splices:
            self._links.pop(joint, None)
            self._parents.discard(joint)
            if parent:
                for child in children:
                    self._link(parent, child)

    def rebuild(self) -> None:
        """Link everything anew. Cost: O(sequences)."""
        self.wake(list(self.watches))
        self._noted = 0
        self._grafts = []
        self._unlinked = []
        self._links.clear()
        self._stale = 0
        for seq, record in self._live.items():
            self._link(record[3], seq)
        for joint, parent in self.joints.items():
            self._link(parent, joint)
        self._links.pop(NO_PARENT, None)
        self._parents = set(self._links)

    def _link_all(self, but: Sequence[Mapping[int, Record]] = ()) -> None:
        """Link what waits for it, all `but` some. Whoever is interrupted does it again."""
        self._all_parents()
        live = self._live
        kept = set(map(id, but))
        for made in self._unlinked:
            if id(made) in kept:
                continue
            for seq in made:
                record = live.get(seq)
                if record is not None and record[3]:
                    self._link(record[3], seq)
        self._noted = 0  # first: whoever is interrupted here notes some of them again
        self._unlinked = list(but)

    def _all_parents(self) -> set[int]:
        while self._grafts:  # whoever is interrupted does it again, before anything else is linked
            links = self._grafts[0]()
            self._links.update(links)
            self._parents.update(links)
            del self._grafts[0]
        waiting = self._unlinked
        if self._noted < len(waiting):
            for made in waiting[self._noted :]:
                self._parents.update(map(PARENT, made.values()))
            self._noted = len(waiting)
        return self._parents

    def _link(self, parent: int, child: int) -> None:
        known = self._links.setdefault(parent, child)
        if type(known) is dict:
            known[child] = None
        elif known != child:
            self._links[parent] = dict.fromkeys((known, child))  # type: ignore[arg-type]

    def _branches(self, seq: int) -> list[int]:
        """Sequences and joints right below. Everything is linked."""
        known = self._links.get(seq)
        if known is None:
            return []
        live = self._live
        joints = self.joints
        if not isinstance(known, dict):
            return [known] if known in live or known in joints else []
        found = [child for child in known if child in live or child in joints]
        if len(known) > 2 * len(found) + SPARSE:
            self._links[seq] = dict.fromkeys(found)  # who comes next need not pass the ended ones
        return found

    # -- questions

    def record(self, seq: int) -> Record | None:
        """The record of a sequence; None where it does not live."""
        return self._live.get(seq)

    def parents(self) -> Collection[int]:
        """All that something hangs on, and some that something hung on."""
        return self._all_parents()

    def living_below(self, seq: int, gone: Container[int]) -> Iterator[int]:
        """The nearest sequences below that live, the newest first, one at a time; those in `gone`,
        which may grow meanwhile, are looked through.
        """
        self._link_all()
        live = self._live
        waiting = [seq]
        while waiting:
            above = waiting.pop()
            for child in reversed(self._branches(above)):
                if child in live and child not in gone:
                    yield child
                else:
                    waiting.append(child)

    # -- who waits for whom

    def watch(self, seq: int, above: int, woken: list[int]) -> None:
        """Put `above` into a list as soon as `seq` has ended."""
        self.watches.setdefault(seq, {})[above] = woken

    def wake(self, seqs: Iterable[int]) -> None:
        """These have ended, or are about to: tell who waits for them."""
        for seq in seqs:
            for above, woken in self.watches.get(seq, {}).items():
                woken.append(above)
            self.watches.pop(seq, None)

    def parent(self, seq: int) -> int | None:
        """The nearest sequence above that lives, or None."""
        above = self._live[seq][3]
        while above in self.joints:
            above = self.joints[above]
        return above or None

    def children(self, seq: int) -> list[int]:
        """The nearest sequences below that live, branch by branch."""
        self._link_all()
        return list(self._walk(self._branches(seq)))

    def below(self, heads: Iterable[int]) -> list[int]:
        """All that lives at or below these, each above what hangs on it. Cost: O(their number)."""
        self._link_all()
        return list(self._walk(heads, beyond=True))

    def rivals(self, seq: int) -> list[int]:
        """What lives below the nearest living parent, or else in its tree, beside `seq` and its
        own.

        Cost: O(their number).
        """
        self._link_all()
        heads: list[int] = []
        own = seq
        above: int | None = self._live[seq][3]
        while above:
            heads += [branch for branch in self._branches(above) if branch != own]
            own = above
            above = self.joints.get(above)
        return list(self._walk(heads, beyond=True))

    def _walk(self, heads: Iterable[int], *, beyond: bool = False) -> Iterator[int]:
        """Those that live, depth first; below them too, or only below joints."""
        waiting = list(heads)[::-1]
        while waiting:
            seq = waiting.pop()
            living = seq in self._live
            if living:
                yield seq
            if beyond or not living:
                waiting += self._branches(seq)[::-1]

    # -- sequences end

    def joints_of(self, doomed: Sequence[int], held: Mapping[int, int]) -> dict[int, int]:
        """Those of `doomed` that something else hangs on, with their parents.

        `held` counts rows of open steps by parent. Cost: O(their children).
        """
        if held.keys().isdisjoint(doomed) and self._all_parents().isdisjoint(doomed):
            return {}
        ending = set(doomed)
        # what ends with its parents needs no link
        self._link_all(but=[made for made in self._unlinked if ending.issuperset(made)])
        inner = [seq for seq in doomed if seq in self._links or seq in held]
        gone = ending.difference(inner)
        joints = {}
        for seq in reversed(inner):  # most lists have children after their parents
            if seq not in held and gone.issuperset(self._branches(seq)):
                gone.add(seq)
            else:
                joints[seq] = self._live[seq][3]
        for seq in list(joints):
            self._hold_above(seq, joints, ending)
        return joints

    def _hold_above(self, joint: int, joints: dict[int, int], ending: set[int]) -> None:
        """What ends above a joint stays as one, too: it may not have been linked."""
        above = joints[joint]
        while above:
            self._link(above, joint)
            if above in joints or above not in ending:
                return
            joint = above
            above = self._live[joint][3]
            joints[joint] = above

    def passed_over(self, joints: Mapping[int, int], doomed: Sequence[int]) -> list[Splice]:
        """Those of `joints` that need not become any: a single sequence hangs on them.

        And what is above them stays.
        """
        found = []
        gone = set(doomed).difference(joints)
        for joint, parent in joints.items():
            if parent in joints or parent in gone:
                continue
            below = [seq for seq in self._branches(joint) if seq not in gone]
            if len(below) == 1 and below[0] not in joints and below[0] in self._live:
                found.append(Splice(joint, parent, below))
        return found

    def splices(self, suspects: Sequence[int], held: Mapping[int, int]) -> list[Splice]:
        """Those joints among `suspects` to take out at once: none is next to another one.

        `held` as in `joints_of`: such a row is a branch as well.
        """
        found: list[Splice] = []
        touched: set[int] = set()
        if not self.joints.keys().isdisjoint(suspects):
            self._link_all()
        for joint in suspects:
            parent = self.joints.get(joint)
            if parent is None or joint in touched:
                continue
            children = self._branches(joint)
            if len(children) + held.get(joint, 0) < 2:
                found.append(Splice(joint, parent, children))
                touched.update((joint, parent, *children))
        return found
