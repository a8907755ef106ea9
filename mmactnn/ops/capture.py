"""Whether a CUDA graph is being captured."""

import torch


def is_capturing():
    """bool: Whether this thread's current stream is being captured.

    What the host does then is done once, for all replays.
    """
    return torch.cuda.is_initialized() and (
        torch.cuda.is_current_stream_capturing()
    )


def refuse_capture(reason):
    """Raise if a CUDA graph is being captured.

    Args:
        reason (str): Why it cannot be, and the remedy.

    Raises:
        RuntimeError: If one is.
    """
    if is_capturing():
        raise RuntimeError(reason)
