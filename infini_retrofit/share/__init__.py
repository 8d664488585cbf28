"""What leaves the project: exported folders, model cards, lm-eval, offline plots.

Knows nothing of training.
"""
