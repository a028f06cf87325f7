"""What quantised products must know of a text, schemes made from it, and what each scheme costs."""

TOKENS = 8192
"""Tokens of calibration text that are read unless told otherwise."""
