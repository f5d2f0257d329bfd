"""Random numbers that follow from where a node stands in its tree, and from nothing else.

A root's seed comes from the seed of the call and its ordinal, a child's from its parent's seed and
its ordinal among the siblings; each token drawn has one uniform number of its own. So draws depend
neither on the batch that a row was drawn in, nor on what was evicted or drawn before, nor on the
process. No tensors in here.
"""

from __future__ import annotations

from hashlib import blake2b


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
