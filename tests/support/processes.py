"""Runs functions and tools in several processes that form a group."""

import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing import ProcessExitedException

from .quick_mmengine import quick_mmengine
from .tools import ROOT, free_port, load_tool


def run_in_processes(function, world_size, argument, device='cpu'):
    """Call a function in every process of a new group.

    They talk through NCCL if they work on GPUs and each can have one of its
    own, else through gloo.

    Args:
        function (Callable): Takes the rank and the argument; importable by
            name, so that it cannot live in a test module.
        world_size (int): Number of processes.
        argument (object): For the function.
        device (str, optional): ``'cuda'`` if it works on GPUs. Defaults to
            ``'cpu'``.

    Returns:
        list: What the processes returned, in the order of their ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = world_size, folder, function, argument, device
        # The server may have initialised CUDA, which does not survive a fork.
        method = 'spawn' if device == 'cuda' else 'forkserver'
        _start(_process, world_size, arguments, method)
        return [
            torch.load(_result(folder, rank), weights_only=False)
            for rank in range(world_size)
        ]


def run_tool_in_forks(name, *arguments, ranks, cwd):
    """Run a tool as the processes of a launcher that find no GPU.

    Args:
        name (str): Of the script in ``tools/``, which has a ``main``.
        *arguments (object): Its command line.
        ranks (int): Number of processes; one runs without a launcher.
        cwd (Path): Where they work.

    Returns:
        str: What they have printed, one after the other.

    Raises:
        ProcessExitedException: If one of them was killed.
    """
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        given = ranks, name, arguments, cwd, folder, free_port()
        _start(_run_tool, ranks, given)
        return ''.join(_log(folder, rank).read_text() for rank in range(ranks))


def _run_tool(rank, world_size, name, arguments, cwd, folder, port):
    quick_mmengine(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    os.environ.update(CUDA_VISIBLE_DEVICES='-1', GLOO_SOCKET_IFNAME='lo')
    if world_size > 1:
        arguments += ['--launcher', 'pytorch']
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(port),
        )
    os.chdir(cwd)
    write_output(_log(folder, rank))
    load_tool(name).main(arguments)


def write_output(path):
    """Have this process print to a file, from now on.

    Args:
        path (Path): The file.
    """
    with open(path, 'w') as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())


def run_alone(function, *arguments):
    """Call a function in a process of its own.

    Args:
        function (Callable): Importable by name.
        *arguments (object): What it takes.

    Returns:
        int: Exit status; negative that of a signal.
    """
    try:
        _start(_run_alone, 1, (function, arguments))
    except ProcessExitedException as error:
        return error.exit_code
    return 0


def _run_alone(rank, function, arguments):
    quick_mmengine(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    function(*arguments)


def _log(folder, rank):
    return Path(folder) / f'{rank}.txt'


def _start(function, count, arguments, method='forkserver'):
    """Start processes, mostly as forks of a server that has imported modules.

    It lives as long as this process, and has no part of its state.
    """
    multiprocessing.set_forkserver_preload(['support.process_modules'])
    paths = [str(ROOT / 'tests'), str(ROOT), os.environ.get('PYTHONPATH', '')]
    with pytest.MonkeyPatch.context() as patch:
        # In some versions of Python it does not know the path of this one.
        patch.setenv('PYTHONPATH', os.pathsep.join(filter(None, paths)))
        forkserver.ensure_running()
    mp.start_processes(function, arguments, nprocs=count, start_method=method)


def _process(rank, world_size, folder, function, argument, device):
    torch.set_num_threads(1)
    quick_mmengine(pytest.MonkeyPatch())
    if device == 'cuda' and torch.cuda.device_count() >= world_size:
        torch.cuda.set_device(rank)
        backend = 'cpu:gloo,cuda:nccl'
    else:
        backend = 'gloo'
    # Does without a port, and without a host name that resolves.
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    dist.init_process_group(
        backend,
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=world_size,
    )
    try:
        torch.save(function(rank, argument), _result(folder, rank))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _result(folder, rank):
    return Path(folder) / f'{rank}.pth'
