"""Build of the package and its extension ``mmactnn._C``.

The extension uses torch's stable ABI and Python's limited API only: one
binary serves every torch >= 2.10 and Python >= 3.10, with and without a GPU.

Environment:
    MMACTNN_WITH_OPS: ``0`` builds no extension at all.
    FORCE_CUDA: ``1`` demands the CUDA kernels, ``0`` leaves them out. By
        default they are built where nvcc is found.
    TORCH_CUDA_ARCH_LIST: GPU architectures, in torch's notation.
    MAX_JOBS: Parallel compiler processes.
"""

import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_support.mim import BuildPyWithMim  # noqa: E402
from build_support.unit import write_units  # noqa: E402

# 2.10.0.0 in the notation of torch/csrc/stable/version.h.
TORCH_TARGET_VERSION = '0x020a000000000000ULL'
# Turing, Ampere, Hopper; anything newer compiles the last one's PTX.
DEFAULT_CUDA_ARCHS = '7.5;8.0;9.0+PTX'
# Sources of csrc/ are compiled as few: apart, each would compile the headers
# that they share again. These kernels take so long that they are compiled side
# by side.
APART = (
    'dequantize_rectified',
    'norm_act',
    'norm_grad',
    'quantize',
    'relu_codes',
    'rotated_codes',
    'rotated_norm_act',
    'rotated_norm_grad',
    'smooth',
)


def find_cuda_home():
    """The CUDA toolkit to build with, or None to build no CUDA kernels.

    Raises:
        RuntimeError: If ``FORCE_CUDA=1`` and there is no nvcc.
    """
    if os.getenv('FORCE_CUDA') == '0':
        return None
    homes = [os.getenv('CUDA_HOME'), os.getenv('CUDA_PATH')]
    nvcc = shutil.which('nvcc')
    if nvcc:
        homes.append(Path(nvcc).resolve().parent.parent)
    homes = [Path(home) for home in (*homes, '/usr/local/cuda') if home]
    for home in homes:
        # An nvcc on the PATH may be a wrapper outside of its toolkit.
        if (home / 'bin/nvcc').exists() and (
            home / 'include/cuda_runtime.h'
        ).exists():
            return str(home)
    if os.getenv('FORCE_CUDA') == '1':
        tried = ', '.join(str(home) for home in homes)
        raise RuntimeError(
            f'FORCE_CUDA=1 needs a CUDA toolkit, but there is none in {tried};'
            ' install it or set CUDA_HOME'
        )
    return None


def cuda_release(cuda_home):
    """The toolkit's version, such as ``13.0``."""
    text = subprocess.check_output(
        [str(Path(cuda_home, 'bin', 'nvcc')), '--version'], text=True
    )
    return re.search(r'release (\d+\.\d+)', text).group(1)


def compression_flag(release):
    """Flag of nvcc that compresses kernels in the binary best.

    The driver unpacks a kernel's module when it is first launched.

    Args:
        release (str): Version of the toolkit.
    """
    # Binaries of this mode need a driver of CUDA 13, which the toolkit's
    # runtime needs anyway.
    if int(release.split('.')[0]) >= 13:
        return '--compress-mode=size'
    return '-Xfatbin=-compress-all'


def fingerprint(paths):
    """A number that differs where the contents of files do."""
    contents = b''.join(Path(ROOT, path).read_bytes() for path in paths)
    return zlib.crc32(contents)


def extension():
    """The extension module, its sources and flags."""
    from torch.utils import cpp_extension

    def find(*patterns):
        # setuptools wants relative paths.
        return sorted(
            str(path.relative_to(ROOT))
            for pattern in patterns
            for path in ROOT.glob(pattern)
        )

    common = [f'-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}', '-std=c++20']
    host = [
        '-O3',
        # Codes must not depend on the compiler's choice of fused
        # multiply-adds.
        '-ffp-contract=off',
        '-fvisibility=hidden',
        # Python's own flags ask for debug symbols, which the linker strips.
        '-g0',
    ]
    flags = dict(cxx=[*common, *host], nvcc=[])
    ops = find('csrc/*.cpp', 'csrc/ops/*.cpp', 'csrc/composite/*.cpp')
    units = {'cpu.cpp': find('csrc/cpu/*.cpp'), 'ops.cpp': ops}
    apart = []
    arguments = {}
    cuda_home = find_cuda_home()
    if cuda_home is not None:
        # torch looks for a toolkit only if it was itself built with CUDA.
        cpp_extension.CUDA_HOME = cuda_home
        release = cuda_release(cuda_home)
        archs = os.environ.setdefault(
            'TORCH_CUDA_ARCH_LIST', DEFAULT_CUDA_ARCHS
        )
        flags['cxx'] += [
            f'-DMMACTNN_CUDA_VERSION={release}',
            f'-DMMACTNN_CUDA_ARCHS={re.sub("[; ]+", "_", archs)}',
        ]
        apart = [f'csrc/cuda/{name}_kernel.cu' for name in APART]
        rest = sorted({*find('csrc/cuda/*.cu')} - {*apart})
        units['cuda.cu'] = rest
        units['runtime.cpp'] = find('csrc/cuda/*.cpp')
        flags['nvcc'] = [
            *common,
            # For host code that launches kernels; kernels have -O3 anyway.
            '-O1',
            '-Xcompiler',
            '-fvisibility=hidden',
            '--threads=2',
            compression_flag(release),
            # torch without CUDA does not have nvcc list the files that a
            # source includes. Commands that differ are run again.
            f'-DMMACTNN_INCLUDED={fingerprint(find("csrc/**/*.h", *rest))}',
        ]
        arguments.update(
            include_dirs=[str(Path(cuda_home, 'include'))],
            library_dirs=[str(Path(cuda_home, 'lib64'))],
            # Static, so that the binary loads without CUDA.
            libraries=['cudart_static', 'dl', 'rt', 'pthread'],
        )
    return cpp_extension.CppExtension(
        'mmactnn._C',
        extra_compile_args=flags,
        py_limited_api=True,
        depends=find('csrc/**/*.h', 'csrc/**/*.cpp', 'csrc/**/*.cu'),
        sources=[*write_units(ROOT, 'build', units), *apart],
        extra_link_args=['-s'],
        **arguments,
    )


def extension_arguments():
    """Arguments of ``setup()`` that concern the extension.

    Raises:
        RuntimeError: If torch is missing.
    """
    if os.getenv('MMACTNN_WITH_OPS') == '0':
        return dict(cmdclass=dict(build_py=BuildPyWithMim))
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f'the kernels of mmactnn are built with torch ({error}); install '
            'torch >= 2.10 first, or set MMACTNN_WITH_OPS=0 to build none'
        ) from error

    return dict(
        ext_modules=[extension()],
        cmdclass=dict(build_ext=BuildExtension, build_py=BuildPyWithMim),
        options=dict(bdist_wheel=dict(py_limited_api='cp310')),
    )


setup(**extension_arguments())
