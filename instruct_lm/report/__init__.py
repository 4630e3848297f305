"""Evaluations side by side: statistics, tables, charts, the page."""
