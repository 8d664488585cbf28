"""The bases: a pretrained model from a wheel, the Hub, a folder, or trained here from scratch.

Knows nothing of Infini layers.
"""
