"""All that the functions of support.processes may need, for its server."""

import gc

# What is imported is there to stay: there is no garbage to look for.
gc.disable()

# Runners import it late.
import matplotlib.backends.backend_agg  # noqa: E402, F401
import matplotlib.figure  # noqa: E402, F401

from support import (  # noqa: E402, F401
    distributed_cases,
    killed_run,
    precision_cases,
    sync_norm_cases,
)
from support.quick_mmengine import describe_environment  # noqa: E402

describe_environment()

# Collections of garbage would copy all of that in every fork.
gc.collect()
gc.freeze()
gc.enable()
