"""Importing this puts every UniZero model on pages that LightZero builds from then on, as long as
the process lives.

For entries that build models in processes of their own. LightZero's main imports what
`policy.import_names` lists before an actor of Ray builds anything:

    >>> create_config.policy.import_names.append(    # doctest: +SKIP
    ...     "paged_kv.integrations.lightzero.everywhere"
    ... )

Contexts whose weights changed are dropped; all else is as `attach` has it.
"""

from __future__ import annotations

from paged_kv.integrations.lightzero.attaching import installed

PAGES = installed(weights="drop")  # kept: it ends with the last one who knows of it
PAGES.__enter__()
