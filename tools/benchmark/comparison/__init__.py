"""Parts of the comparison of accuracies, ``tools/benchmark/accuracy.py``."""
