"""Flax transformers that run on compressed weights, one file a family."""
