"""Parts of the comparison of accuracies, ``tools/benchmark/accuracy.py``."""

import sys
from pathlib import Path

# Logs are read by code of compare_runs.py, which is not in a package.
sys.path.append(str(Path(__file__).parents[2] / 'analysis_tools'))
