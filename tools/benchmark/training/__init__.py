"""Parts of the training benchmark, ``tools/benchmark/train.py``."""
