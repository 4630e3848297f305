"""Instruction fine-tuning of a from-scratch GPT. Importing the package imports no torch."""

import os

__version__ = "0.1.0"

# How long a thread of torch's on Linux spins before it sleeps; libgomp reads it once, as torch is imported. At its own
# 300,000, threads that wait keep busy cores from those they wait for: docs/performance.md, "Beside other programs".
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
