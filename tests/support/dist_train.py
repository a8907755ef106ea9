"""Trains by tools/dist_train.sh and compares what the processes end with."""

import torch

from .tools import run_tool


def train(config, ranks, *options, cwd, nodes=1):
    """Train on several processes, which need a ``RankStateHook``.

    Args:
        config (Path): The config; runs are written beside it.
        ranks (int): Processes of a node.
        *options (str): For ``train.py``.
        cwd (Path): Where to work.
        nodes (int, optional): Defaults to 1.

    Returns:
        tuple[str, list[dict]]: The log, and what each process ended with.
    """
    work_dir = config.parent / 'work_dir'
    arguments = [config, ranks, '--work-dir', work_dir, *options]
    log = run_tool('dist_train.sh', *arguments, cwd=cwd, nodes=nodes)
    return log, load_states(work_dir, nodes * ranks)


def load_states(work_dir, ranks):
    """Load the final states that the processes have written."""
    states = []
    for rank in range(ranks):
        file = work_dir / f'rank{rank}.pth'
        states.append(torch.load(file))
        file.unlink()
    assert not list(work_dir.glob('rank*.pth')), 'more processes than asked'
    losses = {tuple(state['losses']) for state in states}
    assert len(losses) == ranks, 'the same data on several'
    return states


def differing(states):
    """Names of what is not equal in all states of a model."""
    one, *others = (state['model'] for state in states)
    return {
        key
        for other in others
        for key in one
        if not torch.equal(one[key], other[key])
    }


def assert_equal_bits(states):
    for state in states[1:]:
        torch.testing.assert_close(
            state['precision'], states[0]['precision'], rtol=0, atol=0
        )
