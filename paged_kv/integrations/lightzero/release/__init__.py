"""LightZero 0.2.0."""
