"""The loss and the Lightning module that minimises it."""
