"""Judges: what scores an answer from 0 to 100 against the reference answer."""
