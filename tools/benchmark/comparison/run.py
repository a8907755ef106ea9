"""One training of a comparison: a config at a level, from a seed."""

import dataclasses
import sys
from pathlib import Path

from run_log import RunLog, choose_metric
from shared.processes import run_logged
from shared.results import OK

_TRAIN = Path(__file__).parents[2] / 'train.py'


@dataclasses.dataclass(frozen=True)
class Run:
    """A config that is trained at one level from one seed.

    Attributes:
        config (str): Path of the config; its first custom hook is
            ``ActNNHook``.
        level (str): Name of the level.
        seed (int): Seed of weights, batches and rounding.
        options (tuple[str]): Overrides ``KEY=VALUE`` of the config.
        probe (str, optional): Path of a config that is trained afterwards, on
            the backbone that this has left, and measures it.
    """

    config: str
    level: str
    seed: int
    options: tuple = ()
    probe: str | None = None

    @property
    def name(self):
        """str: Its name, and that of its work directory."""
        return f'{Path(self.config).stem}_{self.level}_{self.seed}'

    async def train(self, folder, environment, timeout=None):
        """Train this and its probe, from where an earlier call has left off.

        Args:
            folder (Path): Folder of work directories; ``log.txt`` in them
                gets what trainings print.
            environment (dict[str, str]): Variables of the processes.
            timeout (float, optional): Seconds of a process.

        Returns:
            dict: See :func:`shared.processes.run_logged`.
        """

        async def train(config, work_dir, *options):
            work_dir.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, _TRAIN, config, '--work-dir', work_dir]
            command += ['--resume', '--cfg-options']
            command += [f'randomness.seed={self.seed}', *options]
            log = work_dir / 'log.txt'
            return await run_logged(command, environment, log, timeout)

        work_dir = folder / self.name
        level = f'custom_hooks.0.level={self.level}'
        outcome = await train(self.config, work_dir, level, *self.options)
        if self.probe is None or outcome['result'] != OK:
            return outcome
        # MMEngine's, which tells the path that the checkpoint was written to:
        # the folder may have been moved since.
        last = Path((work_dir / 'last_checkpoint').read_text()).name
        # The level is the probe's own: every backbone has the same.
        return await train(
            self.probe,
            folder / f'{self.name}_probe',
            f'model.backbone.init_cfg.checkpoint={work_dir / last}',
        )

    def read_figures(self, folder, metrics=None):
        """Losses and evaluations, as pairs of step and value, and memory.

        The evaluations are those of a probe, if there is one. Of metrics, or
        else of the usual ones, the first that was logged counts.
        """
        log = evaluated = RunLog(folder / self.name)
        if self.probe:
            evaluated = RunLog(folder / f'{self.name}_probe')
        metric = choose_metric(evaluated.metrics)
        if metrics:
            known = (name for name in metrics if name in evaluated.metrics)
            metric = next(known, None)
        lines = sorted(log.train.items())
        last = lines[-1][1] if lines else {}
        sizes = ('saved_mib', 'exact_mib', 'peak_mib')
        return dict(
            metric=metric,
            unit=evaluated.unit,
            evaluations=list(map(list, evaluated.curve(metric).items())),
            losses=[[step, v['loss']] for step, v in lines if 'loss' in v],
            **{name: last.get(f'actnn/{name}') for name in sizes},
        )
