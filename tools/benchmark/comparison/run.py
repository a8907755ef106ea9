"""What is trained once: a config at a level, from a seed."""

import dataclasses
import sys
from pathlib import Path

_TRAIN = Path(__file__).parents[2] / 'train.py'

# What can become of a run, and what it is until then.
OK = 'ok'
TIMEOUT = 'timeout'
ERROR = 'error'
UNFINISHED = 'unfinished'


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

    @classmethod
    def from_dict(cls, values):
        """The run that a row of results holds.

        Args:
            values (dict): Attributes by name, and perhaps other entries.

        Returns:
            Run: The run.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        settings = {name: values[name] for name in names}
        return cls(**{**settings, 'options': tuple(settings['options'])})

    @property
    def name(self):
        """str: Its name, and that of its work directory."""
        return f'{Path(self.config).stem}_{self.level}_{self.seed}'

    def command(self, work_dir):
        """What trains it, from where an earlier call has left off.

        Args:
            work_dir (Path): Where to train.

        Returns:
            list[str]: The command.
        """
        level = f'custom_hooks.0.level={self.level}'
        return _command(self.config, work_dir, self.seed, level, *self.options)

    def probe_command(self, work_dir, checkpoint):
        """What measures the backbone it has left.

        The level is the probe's own, so that every backbone has the same.

        Args:
            work_dir (Path): Where to train the probe.
            checkpoint (Path): What the run has left.

        Returns:
            list[str]: The command.
        """
        backbone = f'model.backbone.init_cfg.checkpoint={checkpoint}'
        return _command(self.probe, work_dir, self.seed, backbone)


def _command(config, work_dir, seed, *options):
    command = [sys.executable, _TRAIN, config, '--work-dir', work_dir]
    command += ['--resume', '--cfg-options', f'randomness.seed={seed}']
    return [*map(str, command), *options]
