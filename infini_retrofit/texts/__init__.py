"""Articles from every source, cleaned, split and tokenised.

Knows neither models nor training.
"""
