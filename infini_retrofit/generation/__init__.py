"""The memory as a `transformers` cache: generate, stream and chat in bounded memory.

Knows nothing of training, texts and protocols.
"""
