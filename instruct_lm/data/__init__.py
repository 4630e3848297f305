"""From a file of instruction entries to batches."""
