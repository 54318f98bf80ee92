"""The integrations beside what they replace; see ../integrations.py."""
