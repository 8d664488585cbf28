"""What a stage stands on: parameters in, files out, the guard of a run, tokens, device.

Knows nothing of models, memories, texts' sources and any stage by name.
"""
