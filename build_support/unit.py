"""Sources that are compiled as one unit."""

import os
from pathlib import Path


def write_unit(root, path, sources):
    """Write a source that includes others.

    Names in their anonymous namespaces are then names of all of them.

    Args:
        root (Path): Folder that the paths are relative to.
        path (str): The source to write; left alone if it is the same already,
            so that it is not compiled again.
        sources (Sequence[str]): The others.

    Returns:
        str: ``path``.
    """
    target = Path(root, path)
    includes = [
        Path(os.path.relpath(Path(root, source), target.parent)).as_posix()
        for source in sources
    ]
    text = ''.join(f'#include "{include}"\n' for include in includes)
    if not target.exists() or target.read_text() != text:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return path
