"""Sources that are compiled as one unit."""

import os
from pathlib import Path


def write_units(root, folder, units):
    """Write sources that include others.

    Names in the anonymous namespaces of the others are then names of all of
    them.

    Args:
        root (Path): Folder that the paths are relative to.
        folder (str): Folder of the units.
        units (dict[str, Sequence[str]]): The others by name of the unit. A
            unit that is the same already is left alone, so that it is not
            compiled again.

    Returns:
        list[str]: Paths of the units.
    """
    Path(root, folder).mkdir(parents=True, exist_ok=True)
    for name, sources in units.items():
        text = ''.join(
            f'#include "{_relative(root, source, folder)}"\n'
            for source in sources
        )
        target = Path(root, folder, name)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    return [f'{folder}/{name}' for name in units]


def _relative(root, source, folder):
    path = os.path.relpath(Path(root, source), Path(root, folder))
    return Path(path).as_posix()
