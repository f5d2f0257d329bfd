"""Small, slow, obviously right: a world model, a search, and two stores of contexts with one
interface.
"""
