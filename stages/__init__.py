"""One module for each stage of dvc.yaml; each runs as `python -m stages.NAME`."""
