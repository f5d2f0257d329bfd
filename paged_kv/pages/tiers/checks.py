"""Whether what a caller gave are tiers."""

from __future__ import annotations

from paged_kv.checks import amount
from paged_kv.errors import BadArgument
from paged_kv.pages.tiers.contract import Tiers

HOOKS = ("begin", "put", "get", "drop")


def checked_tiers(tiers: object) -> Tiers | None:
    """The tiers of a cache, with a place of its own. Raises BadArgument, BadCount, and what a
    function raises that makes a place.
    """
    if tiers is None:
        return None
    if not isinstance(tiers, Tiers):
        raise BadArgument("tiers", tiers, "None or Tiers(...)")
    if not callable(getattr(tiers.policy, "order", None)):
        raise BadArgument("policy", tiers.policy, "an object with order()")
    frames = tiers.frames
    if frames is None and tiers.cold is not None:
        raise BadArgument("frames", None, "an int >= 2, where there is a cold tier")
    if frames is not None:
        frames = amount("frames", frames, 2)
        if tiers.cold is None:
            raise BadArgument("cold", None, "a place for pages, where frames are counted")
    cold = tiers.cold() if callable(tiers.cold) else tiers.cold
    if cold is not None and not all(hasattr(cold, hook) for hook in HOOKS):
        allowed = "None, HostTier(...) or FileTier(...), or a function that makes one"
        raise BadArgument("cold", cold, allowed)
    return tiers._replace(frames=frames, cold=cold)
