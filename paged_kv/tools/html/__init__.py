"""One self-contained page that shows what a search did to a cache. Needs the extra `report`. See
docs/report.md.
"""

from paged_kv.tools.html.page import page

__all__ = ["page"]
