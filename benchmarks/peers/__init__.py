"""Other keepers of K/V contexts beside `paged_kv`, on the same tree searches, in one run: see
run.py.
"""
