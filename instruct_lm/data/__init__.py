"""From a file of instruction entries to packed batches."""
