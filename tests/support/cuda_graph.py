"""Captures steps in CUDA graphs."""

import torch


def warm_up(step, times=3):
    """Run a step some times before it is captured, on a stream of its own.

    Args:
        step (Callable): Takes nothing.
        times (int, optional): Defaults to 3.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def capture(step):
    """Capture a step that has been warmed up.

    Args:
        step (Callable): Takes nothing.

    Returns:
        tuple[Callable, Any]: What replays the graph, and what the step
        returned; replays write to its tensors.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def pretend_capture(monkeypatch):
    """Have the package believe that a graph is being captured.

    Args:
        monkeypatch (pytest.MonkeyPatch): Undoes it after the test.
    """
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(
        torch.cuda, 'is_current_stream_capturing', lambda: True
    )
