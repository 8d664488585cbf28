"""Protocols, rivals and gains: the scores of a model, and of what it must beat.

Knows nothing of training.
"""
