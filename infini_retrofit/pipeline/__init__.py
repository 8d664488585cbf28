"""What every stage needs: parameters, files, tokens, the device and the guard of a run.

Knows no model, no memory, no source of texts and no stage by name.
"""
