"""Tests that break files, disks and processes; `pytest -m faults` runs them."""
