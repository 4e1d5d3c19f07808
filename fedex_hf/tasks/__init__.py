"""Data sets of the recipes: loading, checking, prompts, generation."""
