"""Makes ``import torchvision`` work where its compiled ops cannot load.

MMPretrain imports torchvision, whose wheels are linked against one build of
torch: beside any other build (CPU-only torch, say) the ops are missing, and
the import stops at the first fake kernel registered for one. The package's
own code never imports torchvision, so that only tests need this.

``make test`` installs torchvision in a directory of its own, because in plain
sight it does harm: MMDetection imports MMPretrain where it can. That it
cannot for want of torchvision, it accepts; that torchvision is broken, not.
"""

import contextlib
import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

TORCHVISION_DIR = Path(sys.prefix, 'torchvision')

# The ops that torchvision registers fake kernels for unconditionally. The
# signatures only have to exist: nothing calls the ops.
SCHEMAS = {
    'nms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
}


@cache
def make_torchvision_importable() -> torch.library.Library | None:
    """Find torchvision, and declare its ops if it cannot load its own.

    Returns:
        torch.library.Library | None: Owner of the declarations, which live
        as long as it does, that is for the rest of the process. None if
        torchvision's own ops load.

    Raises:
        ModuleNotFoundError: If torchvision is not installed.
    """
    with _in_sight():
        spec = importlib.util.find_spec('torchvision')
        if spec is None:
            raise ModuleNotFoundError(
                'torchvision is not installed: pip install --no-deps --target '
                f'{TORCHVISION_DIR} -r requirements/torchvision.txt'
            )
        library = None
        try:
            torch.ops.load_library(Path(spec.origin).with_name('_C.so'))
        except OSError:
            library = torch.library.Library('torchvision', 'DEF')
            for name, signature in SCHEMAS.items():
                library.define(name + signature)
        # While it can be found; its parts are, from now on, by the package.
        importlib.import_module('torchvision')
    return library


@contextlib.contextmanager
def _in_sight():
    """Find torchvision in its own directory for as long as that takes.

    Processes that are started later inherit the path, but no declarations.
    """
    sys.path.append(str(TORCHVISION_DIR))
    try:
        yield
    finally:
        sys.path.remove(str(TORCHVISION_DIR))


def need_mmpretrain() -> None:
    """Make MMPretrain importable, or skip the test where that cannot be.

    MMDetection comes first, which would import it if it could.
    """
    if importlib.util.find_spec('mmpretrain') is None or not (
        TORCHVISION_DIR.exists() or importlib.util.find_spec('torchvision')
    ):
        pytest.skip('mmpretrain or torchvision is not installed')
    importlib.import_module('mmdet.models')
    make_torchvision_importable()
