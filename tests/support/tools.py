"""Loads and starts what is in tools/, which is no package."""

import contextlib
import importlib.util
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import TextIO

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
    """A port of this machine that nobody listens to.

    Not one of those that the system gives to connections: by the time it is
    used, another test may have it then.
    """
    # Its own source: tests seed the others alike in all workers.
    ports = random.SystemRandom()
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = ports.randrange(10000, 32768)
            probe.bind(('127.0.0.1', port))
            return port


def start_tool(
    name: str, *arguments: object, cwd: Path, **environ: object
) -> tuple[subprocess.Popen, TextIO]:
    """Start a script without a GPU.

    Args:
        name (str): Its path inside ``tools/``: Python's or a shell's.
        *arguments (object): Its command line.
        cwd (Path): Where it works.
        **environ (object): Additional variables, such as ``PORT``.

    Returns:
        tuple[subprocess.Popen, TextIO]: The process, and the file that it
        prints to: one that has to wait until a pipe is read may have others
        wait for it.
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
    output = tempfile.TemporaryFile('w+')
    process = subprocess.Popen(
        [program, str(ROOT / 'tools' / name), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **{k: str(v) for k, v in environ.items()}},
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    return process, output


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
    # If one of them fails, the others wait for it in vain.
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        codes = [node.poll() for node, _ in started]
        if None not in codes or any(codes):
            break
        time.sleep(0.1)
    logs = []
    for node, output in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(5)
        node.kill()
        output.seek(0)
        logs.append(output.read())
        output.close()
    for node, _ in started:
        assert (node.wait() != 0) == fails, '\n'.join(logs)
    return ''.join(logs)
