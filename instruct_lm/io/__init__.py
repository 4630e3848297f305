"""Files: sources and downloads, atomic writes, GGUF headers."""
