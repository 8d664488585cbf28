"""Tests; `tests.tiny` holds the models that they share."""
