"""Infini-attention as one attention module: equations, segments, state; start at `naive`.

Needs torch alone. Knows nothing of `transformers`, models, losses and files.
"""
