"""What the release and the main branch of LightZero have in common."""
