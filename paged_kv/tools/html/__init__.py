"""Self-contained pages that show what a search did to a cache, or to the caches of many workers.

They need the extra `report`. See docs/report.md.
"""

from paged_kv.tools.html.page import page
from paged_kv.tools.html.workers import workers_page

__all__ = ["page", "workers_page"]
