"""The layer inside a `transformers` model: insert it, run it by segments, save and load it.

Knows nothing of losses, texts and the pipeline's folders.
"""
