"""Speed and memory, as ratios to this machine's matrix products; not part of the pipeline.

Run by `python -m benchmarks` (or `make benchmark`); needs models/base.
"""
