"""The compiled library: loading, build information and its kernels."""

import ctypes
import functools
import json
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent
_REBUILD = (
    'build it with `pip install --no-build-isolation .` from the '
    'source tree (`FORCE_CUDA=1` demands the CUDA kernels)'
)


def find_library():
    """Path of the compiled library, or None if the package has none."""
    return next(iter(sorted(_PACKAGE.glob('_C*.so'))), None)


@functools.lru_cache(maxsize=1)
def load_error():
    """Load the library once.

    Returns:
        str, optional: Why there are no kernels, and the remedy. None if they
        are there.
    """
    library = find_library()
    if library is None:
        return (
            'mmactnn was installed without its compiled kernels '
            f'({_PACKAGE}/_C.abi3.so is missing); {_REBUILD}'
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return (
            f'{library} cannot be loaded with torch {torch.__version__}: '
            f'{error}; mmactnn needs torch >= 2.10: update torch or '
            f'{_REBUILD}'
        )
    return None


def require_extension():
    """Make sure that the kernels are there.

    Raises:
        RuntimeError: If the library is missing or cannot be loaded.
    """
    error = load_error()
    if error is not None:
        raise RuntimeError(error)


def build_info():
    """Versions that the library was built with.

    Returns:
        dict: ``torch`` and ``compiler`` (str); ``cuda`` and ``cuda_archs``
        (str, or None for a build without CUDA kernels).

    Raises:
        RuntimeError: If the library is missing or cannot be loaded.
    """
    require_extension()
    read = ctypes.CDLL(str(find_library())).mmactnn_build_info
    read.restype = ctypes.c_char_p
    return json.loads(read().decode())


@functools.cache
def has_kernels(device_type, op='quantize'):
    """Whether an op has kernels for a device.

    Args:
        device_type (str): As in ``torch.device.type``, such as ``'cuda'``.
        op (str, optional): Name of the op. Defaults to ``'quantize'``, which
            stands for all: they are built together.
    """
    return (
        load_error() is None
        and torch._C._dispatch_has_kernel_for_dispatch_key(
            f'mmactnn::{op}', _dispatch_key(device_type)
        )
    )


def op_names():
    """Names of all ops of the package.

    Returns:
        list[str]: From the dispatcher, without the namespace, sorted.

    Raises:
        RuntimeError: If the library is missing or cannot be loaded.
    """
    require_extension()
    # Each has a single overload, whose name is empty.
    return sorted(
        name.removeprefix('mmactnn::')
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith('mmactnn::')
    )


def kernels_of(op):
    """Kinds of kernels that an op has.

    Args:
        op (str): Name of the op.

    Returns:
        list[str]: A subset of ``'CPU'``, ``'CUDA'`` and ``'Meta'`` (shapes
        alone).
    """
    kinds = [key for key in ('CPU', 'CUDA') if has_kernels(key.lower(), op)]
    # A composite op has no registered kernel, but a computed one.
    if torch._C._dispatch_has_computed_kernel_for_dispatch_key(
        f'mmactnn::{op}', 'Meta'
    ):
        kinds.append('Meta')
    return kinds


def require_kernels(device):
    """Make sure that there are kernels for a device.

    Args:
        device (torch.device): Where the tensors are.

    Raises:
        RuntimeError: If there are none.
    """
    if has_kernels(device.type):
        return
    require_extension()
    built = 'CPU and CUDA' if has_kernels('cuda') else 'CPU'
    raise RuntimeError(
        f'mmactnn has no kernels for tensors on {device}: this build has '
        f'{built} kernels; move the tensors there, or {_REBUILD}'
    )


def _dispatch_key(device_type):
    return torch._C._parse_dispatch_key(
        {'cpu': 'CPU', 'cuda': 'CUDA', 'meta': 'Meta'}.get(
            device_type, 'PrivateUse1'
        )
    ).name
