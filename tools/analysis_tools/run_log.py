"""Scalars from the logs of a training, including resumed parts."""

import json
import numbers

# Names of metrics, or their last parts after a slash. The first one that was
# logged represents a run.
METRICS = (
    'bbox_mAP',
    'segm_mAP',
    'mAP',
    'mIoU',
    'mDice',
    'accuracy/top1',
    'top1',
    'accuracy',
    'aAcc',
    'mAcc',
)

# Entries of a line other than metrics.
_BOOKKEEPING = ('step', 'iter', 'epoch', 'time', 'data_time', 'memory', 'lr')


class RunLog:
    """Scalars of a training.

    Parts of a training are in folders named by their time. An earlier part
    ends where a later one begins, as that was resumed from a checkpoint.

    Attributes:
        train (dict[int, dict]): Scalars by iteration.
        evaluations (dict[int, dict]): Scalars by step, which is an iteration
            or an epoch.
        notices (list[str]): Lines that could not be read.

    Args:
        work_dir (Path): Work directory of the training.
    """

    def __init__(self, work_dir):
        self.work_dir = work_dir
        self.train, self.evaluations, self.notices = {}, {}, []
        for folder in sorted(work_dir.glob('*/vis_data')):
            train, evaluations = {}, {}
            for values in self._read(folder):
                training = values.keys() & {'loss', 'lr', 'iter'}
                part = train if training else evaluations
                part[values['step']] = values
            if train and min(train) <= min(self.train, default=0):
                # Started again from the beginning.
                self.evaluations = {}
            self.train = _continue(self.train, train)
            self.evaluations = _continue(self.evaluations, evaluations)

    @property
    def unit(self):
        """str: Unit of the steps of evaluations."""
        by_epoch = any('epoch' in values for values in self.train.values())
        return 'epoch' if by_epoch else 'iteration'

    @property
    def metrics(self):
        """list[str]: Names of numbers in the evaluations, as logged."""
        names = {
            name: None
            for values in self.evaluations.values()
            for name, value in values.items()
            if isinstance(value, numbers.Real) and name not in _BOOKKEEPING
        }
        return list(names)

    def curve(self, name):
        """Values of a metric by step.

        Args:
            name (str): Name in the evaluations.

        Returns:
            dict[int, float]: The values, in the order of their steps.
        """
        return {
            step: values[name]
            for step, values in sorted(self.evaluations.items())
            if name in values
        }

    def _read(self, folder):
        """Yield the lines of a part."""
        # MMEngine writes every line to a file named by the time, too.
        path = folder / 'scalars.json'
        paths = [path] if path.exists() else sorted(folder.glob('*.json'))
        for path in paths:
            with open(path, errors='replace') as file:
                for number, line in enumerate(file, 1):
                    try:
                        values = json.loads(line)
                        values['step'] += 0
                    except (ValueError, TypeError, KeyError):
                        self.notices.append(
                            f'line {number} of {path} is left out: it must '
                            'be a json object with a step, got '
                            f'{line.strip()[:40]!r}'
                        )
                    else:
                        yield values


def choose_metric(names):
    """Choose the metric that represents a run.

    Args:
        names (Sequence[str]): Names of metrics.

    Returns:
        str, optional: The first of ``METRICS`` among them, else their first;
        None if there are none.
    """
    for wanted in METRICS:
        for name in names:
            if name == wanted or name.endswith(f'/{wanted}'):
                return name
    return next(iter(names), None)


def _continue(earlier, later):
    """Join values by step; earlier ones end where later ones begin."""
    end = min(later, default=float('inf'))
    kept = {step: value for step, value in earlier.items() if step < end}
    return kept | later
