"""Models in other programs' formats."""

WRITTEN = ("README.md", "*.safetensors", "*.json", "chat_template.jinja", "*.gguf", "Modelfile")
"""Patterns of the files that an export may hold."""
