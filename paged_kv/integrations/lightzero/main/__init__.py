"""The main branch of LightZero."""
