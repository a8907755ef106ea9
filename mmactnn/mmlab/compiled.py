"""Compiled training steps of MMEngine's runner that keep codes."""

import torch

from ..compiler import compile_options, compile_report
from ..compiler.options import refuse_converted
from ..random import default_generator

_STEP = 'train_step'


class CompiledStep:
    """The runner's setting ``compile``, with the partitioner of a level.

    Args:
        settings (dict): Arguments of ``torch.compile``.
    """

    def __init__(self, settings):
        self._settings = settings
        self._is_reported = False

    @classmethod
    def of(cls, hook, runner, model):
        """Make one if the runner compiles and the level keeps codes.

        Args:
            hook (ActNNHook): The hook.
            runner (Runner): The runner.
            model (nn.Module): Its model, without a wrapper.

        Returns:
            CompiledStep, optional: None if it does not.

        Raises:
            ValueError: If the hook tells layers apart, or the model has
                compressed layers.
        """
        asked = runner.cfg.get('compile')
        if not isinstance(asked, (bool, dict)) or asked is False:
            return None
        if hook.level.exact:
            return None
        if hook.include is not None or hook.exclude or hook.filter_fn:
            raise ValueError(
                'include, exclude and filter_fn of ActNNHook tell layers '
                f'apart, and compile={asked!r} has none: remove them, or '
                'compile'
            )
        refuse_converted(model)
        arguments = {} if asked is True else dict(asked)
        names = ('backend', 'options', 'mode')
        chosen = {n: arguments.pop(n) for n in names if n in arguments}
        settings = compile_options(hook.level, **chosen)
        for parameter in model.parameters():
            default_generator.prepare(parameter.device)
        return cls({**settings, **arguments})

    def install(self, model):
        """Compile the step anew, in place of what the runner compiled.

        That has not been called yet, so that nothing is compiled twice.

        Args:
            model (nn.Module): The runner's model, with its wrapper.
        """
        step = getattr(model, _STEP)
        step = getattr(step, '_torchdynamo_orig_callable', step)
        setattr(model, _STEP, torch.compile(step, **self._settings))

    def report_once(self, logger):
        """Log what the graphs keep, after the first step.

        Args:
            logger (MMLogger): The runner's.
        """
        if not self._is_reported:
            self._is_reported = True
            logger.info(f'ActNN {compile_report(self._settings)}')
