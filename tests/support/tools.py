"""Loads the scripts in tools/, which are not in a package."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name: str) -> ModuleType:
    """Import a script.

    Args:
        name (str): Its path inside ``tools/``.

    Returns:
        ModuleType: The script as a module; its ``main`` was not run.
    """
    path = ROOT / 'tools' / name
    spec = importlib.util.spec_from_file_location(f'tools_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
