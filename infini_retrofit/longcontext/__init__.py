"""What is recalled from far back: pass keys, stored numbers, and the loss by position.

Every model reads through a cache, as in use: once, piece by piece. Knows nothing of training.
"""
