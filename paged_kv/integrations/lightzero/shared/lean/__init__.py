"""The step of a search as one short function over a world model's own modules."""
