"""LightZero's UniZero on paged key/value contexts: of release 0.2.0 and of main.

One call swaps the cache of a model or of a policy, one argument chooses which cache it is, and a
context manager does the same for a whole training run. Importing this package imports LightZero;
importing `paged_kv` does not.

    >>> from paged_kv.integrations.lightzero import attach          # doctest: +SKIP
    >>> attach(policy)                                              # doctest: +SKIP
    >>> attach(policy, cache="lightzero")   # and back              # doctest: +SKIP
"""

# First: where another LightZero is installed, this names it before anything else of it is imported.
from paged_kv.integrations.lightzero.shared.versions import FOUND  # isort: skip

from paged_kv.integrations.lightzero.attaching import attach, installed

__all__ = ["FOUND", "attach", "installed"]
