"""Detection of CUDA graph capture."""

import torch


def is_capturing():
    """bool: Whether this thread's current stream is being captured.

    Work of the host is then done once, and not in replays.
    """
    return torch.cuda.is_initialized() and (
        torch.cuda.is_current_stream_capturing()
    )


def refuse_capture(reason):
    """Raise if a CUDA graph is being captured.

    Args:
        reason (str): Why the call cannot be captured, and the remedy.

    Raises:
        RuntimeError: If a graph is being captured.
    """
    if is_capturing():
        raise RuntimeError(reason)
