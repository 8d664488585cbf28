"""The texts: articles from every source, cleaned, dealt to splits and tokenised.

Knows neither models nor training.
"""
