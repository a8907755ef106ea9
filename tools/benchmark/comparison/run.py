"""One training of a comparison: a config at a level, from a seed."""

import dataclasses
import re
import sys
from pathlib import Path

from run_log import RunLog, choose_metric
from shared.levels import read_level
from shared.processes import run_logged
from shared.results import OK

_TRAIN = Path(__file__).parents[2] / 'train.py'

# Options of a command line cannot hold all that a level can.
_CONFIG = """_base_ = {config!r}
custom_hooks = _base_.custom_hooks
custom_hooks[0].level = {level!r}
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A config that is trained at one level from one seed.

    The first custom hook of the config is ``ActNNHook``; options override its
    settings by ``KEY=VALUE``. The level is a text for
    :func:`shared.levels.read_level`. A probe is the path of a config that is
    trained afterwards on the trained backbone, to evaluate it.
    """

    config: str
    level: str
    seed: int
    options: tuple = ()
    probe: str | None = None

    @property
    def name(self):
        """str: Name of the run and of its work directory."""
        level = re.sub(r'[^\w.]+', '-', self.level).strip('-')
        return f'{Path(self.config).stem}_{level}_{self.seed}'

    async def train(self, folder, environment, timeout=None):
        """Train the run and its probe, or resume them.

        Their output goes to ``log.txt`` in their work directories.
        The result is that of :func:`shared.processes.run_logged`.
        """

        async def train(config, work_dir, *options):
            work_dir.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, _TRAIN, config, '--work-dir', work_dir]
            command += ['--resume', '--cfg-options']
            command += [f'randomness.seed={self.seed}', *options]
            log = work_dir / 'log.txt'
            return await run_logged(command, environment, log, timeout)

        work_dir, config = folder / self.name, folder / f'{self.name}.py'
        config.write_text(
            _CONFIG.format(
                config=str(Path(self.config).resolve()),
                level=read_level(self.level),
            )
        )
        outcome = await train(config, work_dir, *self.options)
        if self.probe is None or outcome['result'] != OK:
            return outcome
        # MMEngine's, which tells the path that the checkpoint was written to:
        # the folder may have been moved since.
        last = Path((work_dir / 'last_checkpoint').read_text()).name
        # The level is the probe's own: every backbone has the same.
        backbone = f'model.backbone.init_cfg.checkpoint={work_dir / last}'
        probe_dir = folder / f'{self.name}_probe'
        return await train(self.probe, probe_dir, backbone)

    def read_figures(self, folder, metrics=None):
        """Losses and evaluations, as pairs of step and value, and memory.

        The evaluations are those of a probe, if there is one. Of metrics, or
        else of the usual ones, the first that was logged counts.
        """
        log = evaluated = RunLog(folder / self.name)
        if self.probe:
            evaluated = RunLog(folder / f'{self.name}_probe')
        names = evaluated.metrics
        wanted = [n for n in metrics if n in names] if metrics else names
        metric = wanted[0] if metrics and wanted else choose_metric(wanted)
        lines = sorted(log.train.items())
        last = lines[-1][1] if lines else {}
        return dict(
            metric=metric,
            unit=evaluated.unit,
            evaluations=list(map(list, evaluated.curve(metric).items())),
            losses=[[step, v['loss']] for step, v in lines if 'loss' in v],
            saved_mib=last.get('actnn/saved_mib'),
            exact_mib=last.get('actnn/exact_mib'),
            peak_mib=last.get('actnn/peak_mib'),
        )
