"""Loads and starts what is in tools/, which is no package."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]

# Seconds in which whatever is started has ended, well or badly.
TIMEOUT = 240


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


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def start_tool(
    name: str, *arguments: object, cwd: Path, **environ: object
) -> subprocess.Popen:
    """Start a script without a GPU.

    Args:
        name (str): Its path inside ``tools/``: Python's or a shell's.
        *arguments (object): Its command line.
        cwd (Path): Where it works.
        **environ (object): Additional variables, such as ``PORT``.

    Returns:
        subprocess.Popen: The process; its output is a pipe of text.
    """
    program = 'bash' if name.endswith('.sh') else sys.executable
    environ.update(
        CUDA_VISIBLE_DEVICES='-1',
        # Does without a host name that resolves.
        GLOO_SOCKET_IFNAME='lo',
        OMP_NUM_THREADS='1',
        # The tools take the python they find, which is to be this one.
        PATH=os.pathsep.join(
            [os.path.dirname(sys.executable), os.environ['PATH']]
        ),
        PYTHONPATH=os.pathsep.join([str(ROOT / 'tests'), str(ROOT)]),
    )
    return subprocess.Popen(
        [program, str(ROOT / 'tools' / name), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **{k: str(v) for k, v in environ.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_tool(
    name: str, *arguments: object, cwd: Path, nodes: int = 1, fails=False
) -> str:
    """Run a script, once on each of several machines that are all this one.

    Args:
        name (str): See :func:`start_tool`.
        *arguments (object): See :func:`start_tool`.
        cwd (Path): See :func:`start_tool`.
        nodes (int, optional): How many machines. Defaults to 1.
        fails (bool, optional): Whether it has to end with an error. Defaults
            to False.

    Returns:
        str: What all of them have printed.
    """
    port = free_port()
    started = [
        start_tool(
            name,
            *arguments,
            cwd=cwd,
            NNODES=nodes,
            NODE_RANK=rank,
            MASTER_ADDR='127.0.0.1',
            PORT=port,
        )
        for rank in range(nodes)
    ]
    try:
        logs = [node.communicate(timeout=TIMEOUT)[0] for node in started]
    finally:
        for node in started:
            node.kill()
    for node, log in zip(started, logs):
        assert (node.returncode != 0) == fails, log
    return ''.join(logs)
