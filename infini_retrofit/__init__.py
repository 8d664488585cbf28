"""A compressive memory of fixed size (Infini-attention) inside pretrained language models."""
