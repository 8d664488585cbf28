"""Where a pretrained model comes from: wheel, Hub, folder, or trained here from scratch.

Knows nothing of Infini layers.
"""
