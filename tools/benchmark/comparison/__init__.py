"""Parts of the comparison of accuracies, ``tools/benchmark/accuracy.py``."""

import sys
from pathlib import Path

# What a training has logged is read as by compare_runs.py; tools/ is no
# package.
sys.path.append(str(Path(__file__).parents[2] / 'analysis_tools'))
