"""Recipes: named overlays of params.yaml, each run as the DVC experiment of its name.

Runs experiments and keeps their results. Knows nothing of what they show: see `analysis`.
"""
