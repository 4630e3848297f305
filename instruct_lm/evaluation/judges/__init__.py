"""Judges: each scores a model's answer from 0 to 100. `factory.make_judge` makes the judge of a configuration."""
