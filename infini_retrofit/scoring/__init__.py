"""The loss of a token and the score of a run, which training and evaluation share.

Knows nothing of protocols, training and which models are compared.
"""
