"""A small GPT, trained on Python's own sources, whose checkpoints are ordinary nanoGPT-style files.

`statecodec demo` tells its story; examples/gpt.py trains it with other sizes and other optimizers.
"""
