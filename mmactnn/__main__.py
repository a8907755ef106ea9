"""``python -m mmactnn``: report on the environment and its problems."""

import importlib
import importlib.metadata
import platform
import sys

import torch
from rich.console import Console
from rich.table import Table

from . import __version__, extension
from .ops.self_check import self_check

_STACK = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')


def module_version(name):
    """Version of an installed module and the distribution it came with.

    Args:
        name (str): Import name.

    Returns:
        str: Such as ``'0.10.12 (onedl-mmengine)'``, or the reason why it
        cannot be imported.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        missing = getattr(error, 'name', None) == name
        return 'not installed' if missing else f'cannot be imported: {error}'
    except Exception as error:  # whatever a broken package raises
        return f'cannot be imported: {error}'
    owners = importlib.metadata.packages_distributions().get(name, ['?'])
    version = getattr(module, '__version__', 'no version')
    return f'{version} ({", ".join(sorted(set(owners)))})'


def collect():
    """Collect the facts and problems of the report.

    Returns:
        tuple[dict, list[str]]: Facts by name, and problems.
    """
    facts = {
        'mmactnn': __version__,
        'Python': f'{platform.python_version()} on {platform.platform()}',
        'torch': f'{torch.__version__} (CUDA {torch.version.cuda})',
        'GPU': ', '.join(
            torch.cuda.get_device_name(i)
            for i in range(torch.cuda.device_count())
        )
        or 'none',
    }
    facts.update((name, module_version(name)) for name in _STACK)
    problems = []
    if extension.load_error() is not None:
        problems.append(extension.load_error())
        facts['extension'] = 'not loaded'
        return facts, problems

    built = extension.build_info()
    archs = (built['cuda_archs'] or '').replace('_', ' ')
    cuda = f'CUDA {built["cuda"]} ({archs})' if built['cuda'] else 'no CUDA'
    facts['extension'] = (
        f'{extension.find_library().name}, built with torch '
        f'{built["torch"]}, {built["compiler"]}, {cuda}'
    )
    for op in extension.op_names():
        facts[f'mmactnn::{op}'] = ', '.join(extension.kernels_of(op))
    devices = [d for d in ('cpu', 'cuda') if extension.has_kernels(d)]
    checked = [d for d in devices if d == 'cpu' or torch.cuda.is_available()]
    for device in checked:
        results = self_check(device)
        facts[f'self-check on {device}'] = ', '.join(
            f'{kind}: {result}' for kind, result in results.items()
        )
        problems += [
            f'self-check of {kind} on {device}: {result}'
            for kind, result in results.items()
            if result != 'ok'
        ]
    if torch.cuda.is_available() and 'cuda' not in devices:
        problems.append(
            'there is a GPU, but the extension was built without '
            'CUDA kernels; rebuild it with FORCE_CUDA=1'
        )
    if 'not installed' in facts['mmengine']:
        problems.append(
            'MMEngine is not installed: configs and ActNNHook '
            'need it, mmactnn.convert_model() does not'
        )
    return facts, problems


def main():
    """Print the report.

    Returns:
        int: Exit status, 1 if kernels are missing or a check of them fails.
    """
    facts, problems = collect()
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for problem in problems:
        console.print(f'[bold red]problem:[/] {problem}', highlight=False)
    if not problems:
        console.print('No problems found.')
    return int(any('MMEngine' not in problem for problem in problems))


if __name__ == '__main__':
    sys.exit(main())
