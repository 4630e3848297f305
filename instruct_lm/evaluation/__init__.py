"""Metrics, judges and reports."""
