"""Distil, fine-tune and train the control, on `transformers.Trainer`.

Knows nothing of protocols and the pipeline's folders.
"""
