"""Pretrained models from a wheel, the Hub or a folder, or trained here.

Knows nothing of Infini layers.
"""
