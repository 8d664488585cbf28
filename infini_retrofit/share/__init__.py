"""What leaves the project: exported folders, model cards, lm-eval.

Knows nothing of training.
"""
