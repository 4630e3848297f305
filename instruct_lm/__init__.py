"""Instruction fine-tuning of a from-scratch GPT. Importing the package imports no torch."""

__version__ = "0.1.0"
