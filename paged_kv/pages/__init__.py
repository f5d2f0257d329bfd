"""Pages and what lies in them: the bookkeeping of a cache and its memory. No client
imports this.
"""
