"""The transformer, its pretrained weights and its generation."""
