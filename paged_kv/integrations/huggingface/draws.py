"""Random numbers that follow from where a node stands in its tree, and from nothing else.

A root's seed comes from the seed of the call and its ordinal, a child's from its parent's seed and
its ordinal among the siblings; each token drawn has one uniform number of its own. So draws depend
neither on the batch that a row was drawn in, nor on what was evicted or drawn before, nor on the
process. No tensors in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from paged_kv.checks import listed, whole
from paged_kv.errors import BadCount

MOST_SEED = 2**64 - 1


def root_seeds(seed: int | Sequence[int], roots: int) -> list[int]:
    """Seeds of roots: those of a list, or what follows from one number.

    Raises BadCount, BadArgument.

    >>> root_seeds([3, 4], 2), root_seeds(7, 1) == [seed_below(7, 0)]
    ([3, 4], True)
    """
    if isinstance(seed, (list, tuple)):
        own = [whole("seed", each, 0, MOST_SEED) for each in listed("seed", seed, "a list")]
        if len(own) != roots:
            raise BadCount("seed (one a root)", len(own), f"{roots} numbers")
        return own
    base = whole("seed", seed, 0, MOST_SEED)
    return [seed_below(base, place) for place in range(roots)]


def seed_below(seed: int, ordinal: int) -> int:
    """The seed of the child of this ordinal: 64 bits.

    >>> seed_below(0, 0) != seed_below(0, 1) != seed_below(1, 0)
    True
    """
    return _mixed(b"child", seed, ordinal)


def uniform(seed: int, index: int) -> float:
    """The number from 0 to 1, 1 excluded, that the token of this index in a path is drawn with.

    >>> 0 <= uniform(7, 0) < 1, uniform(7, 0) == uniform(7, 0), uniform(7, 0) == uniform(7, 1)
    (True, True, False)
    """
    return (_mixed(b"token", seed, index) >> 11) * 2.0**-53


def _mixed(kind: bytes, seed: int, number: int) -> int:
    data = seed.to_bytes(8, "little") + number.to_bytes(8, "little")
    return int.from_bytes(blake2b(data, digest_size=8, person=kind).digest(), "little")
