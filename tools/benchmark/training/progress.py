"""Shows in the terminal how far a benchmark has come."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def make_console():
    """Where a benchmark prints.

    Returns:
        Console: The terminal, or a log with lines wide enough for tables.
    """
    console = Console()
    # A log has no width of its own.
    return console if console.is_terminal else Console(width=140)


def make_progress(console):
    """A bar of what is done, with the time it has taken and will take.

    Args:
        console (Console): Where to print.

    Returns:
        Progress: The bar, without a task.
    """
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
