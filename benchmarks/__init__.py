"""Speed and memory, as ratios to this machine's matrix products; no part of the pipeline.

`python -m benchmarks` (or `make benchmark`) runs them on models/base.
"""
