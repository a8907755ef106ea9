"""Settings of one measurement of training."""

import dataclasses
import re

PRECISIONS = ('fp32', 'fp16', 'bf16')


@dataclasses.dataclass(frozen=True)
class Trial:
    """A model that one system trains for some steps on one batch.

    Attributes:
        model (str): Model, see :func:`training.models.build_task`.
        system (str): System, see :func:`training.systems.parse_system`.
        batch_size (int): Images in the batch.
        image_size (tuple[int, int]): Height and width of the images.
        precision (str): One of ``PRECISIONS``, by autocast.
        channels_last (bool): Whether images and weights are in that layout.
        cfg_options (tuple[str]): Overrides ``KEY=VALUE`` of a config.
        device (str): Device of the training.
        warmup (int): Steps before those that count.
        steps (int): Steps that count.
        memory_limit_mib (float, optional): Most memory of the GPU.
        timeline (bool): Whether the memory is followed through one step.
        trace (str, optional): File for a trace of two steps.
    """

    model: str
    system: str
    batch_size: int
    image_size: tuple
    precision: str = 'fp32'
    channels_last: bool = False
    cfg_options: tuple = ()
    device: str = 'cuda'
    warmup: int = 12
    steps: int = 10
    memory_limit_mib: float | None = None
    timeline: bool = False
    trace: str | None = None

    def __str__(self):
        model, (height, width) = short_name(self.model), self.image_size
        size = f'batch {self.batch_size} of {height}x{width}'
        return f'{model} {self.system}, {size}'


def short_name(model):
    """Name of a model without its folder."""
    return model.rpartition('/')[2]


def file_name(text):
    """Text as the name of a file."""
    return re.sub(r'[^\w.-]', '_', text)
