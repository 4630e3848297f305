"""Faults on purpose: what the project does with hostile files, kills, full disks, lying servers and two owners."""
