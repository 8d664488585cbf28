"""Where texts come from: articles, cleaned, split by article and tokenised.

Knows nothing of models and of what is trained on the text.
"""
