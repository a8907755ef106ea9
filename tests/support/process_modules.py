"""All that the functions of support.processes may need, for its server."""

# Runners import it late.
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401

from support import (  # noqa: F401
    distributed_cases,
    killed_run,
    precision_cases,
    sync_norm_cases,
)
