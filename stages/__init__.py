"""One module for each stage of dvc.yaml; each runs as `python -m stages.NAME`."""

from infini_retrofit.pipeline.guard import note_code

note_code()  # before a stage imports the rest, which takes seconds
