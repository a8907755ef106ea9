"""All that the functions of support.processes may need, for its server."""

import gc

# Runners import it late.
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401

from support import (  # noqa: F401
    distributed_cases,
    killed_run,
    precision_cases,
    sync_norm_cases,
)

# Collections of garbage would copy all of that in every fork.
gc.collect()
gc.freeze()
