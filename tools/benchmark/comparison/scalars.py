"""Reads what trainings have logged."""

import json


class Scalars:
    """What a training has logged, all of its resumed parts together.

    Where parts overlap, which they do after a checkpoint that a training was
    resumed from, the later one counts.

    Attributes:
        train (dict[int, dict]): Scalars by iteration.
        evaluations (dict[int, dict]): Scalars by step, which is an iteration
            or an epoch.

    Args:
        work_dir (Path): Work directory of the training. It may be that
            nothing was logged.
    """

    def __init__(self, work_dir):
        self.train = {}
        self.evaluations = {}
        # The directories of the parts are named by their time.
        for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
            for line in path.read_text().splitlines():
                values = json.loads(line)
                kind = self.train if 'loss' in values else self.evaluations
                kind[values['step']] = values

    @property
    def unit(self):
        """str: What the steps of evaluations count."""
        by_epoch = any('epoch' in values for values in self.train.values())
        return 'epoch' if by_epoch else 'iteration'


def read_figures(work_dir, probe_dir, metrics):
    """What a run has reached.

    Args:
        work_dir (Path): Its work directory.
        probe_dir (Path, optional): That of its probe, whose evaluations count
            instead of its own. Defaults to none.
        metrics (Sequence[str]): Names of metrics, of which the first that was
            logged counts.

    Returns:
        dict: ``losses`` and ``evaluations``, lists of step and value;
        ``metric`` and ``unit``, what the latter hold and what their steps
        count; ``saved_mib``, ``exact_mib`` and ``peak_mib`` as logged last,
        None where they were not.
    """
    scalars = Scalars(work_dir)
    evaluated = scalars if probe_dir is None else Scalars(probe_dir)
    logged = {name for line in evaluated.evaluations.values() for name in line}
    metric = next((name for name in metrics if name in logged), None)
    steps = sorted(scalars.train)
    last = scalars.train[steps[-1]] if steps else {}
    return dict(
        metric=metric,
        unit=evaluated.unit,
        evaluations=[
            [step, line[metric]]
            for step, line in sorted(evaluated.evaluations.items())
            if metric in line
        ],
        losses=[[step, scalars.train[step]['loss']] for step in steps],
        **{
            name: last.get(f'actnn/{name}')
            for name in ('saved_mib', 'exact_mib', 'peak_mib')
        },
    )
