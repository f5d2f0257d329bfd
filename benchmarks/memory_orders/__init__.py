"""Memory orders of the pool, from pages apart to all pages in one piece, measured in one run: see
run.py.
"""
