"""Runs a function in several processes that form a group."""

import multiprocessing
import os
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .quick_configs import quick_configs
from .tools import ROOT


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
        _prepare()
        mp.start_processes(
            _process,
            (world_size, folder, function, argument, device),
            nprocs=world_size,
            start_method='forkserver',
        )
        return [
            torch.load(_result(folder, rank), weights_only=False)
            for rank in range(world_size)
        ]


def _prepare():
    """Have a server import, once, what processes forked from it need.

    It lives as long as this process, and has no part of its state.
    """
    multiprocessing.set_forkserver_preload(['support.process_modules'])
    paths = [str(ROOT / 'tests'), str(ROOT), os.environ.get('PYTHONPATH', '')]
    with pytest.MonkeyPatch.context() as patch:
        # In some versions of Python it does not know the path of this one.
        patch.setenv('PYTHONPATH', os.pathsep.join(filter(None, paths)))
        forkserver.ensure_running()


def _process(rank, world_size, folder, function, argument, device):
    torch.set_num_threads(1)
    quick_configs(pytest.MonkeyPatch())
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
