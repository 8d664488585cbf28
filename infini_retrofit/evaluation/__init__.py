"""Protocols, rivals, gains: what a model scores, beside what it must beat.

Knows nothing of training.
"""
