"""Recipes: named overlays of params.yaml, each run as the DVC experiment of its name."""
