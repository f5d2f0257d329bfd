"""Pages that are not all in the pool's own memory: names of pages stay, the frames that they lie in
change.
"""
