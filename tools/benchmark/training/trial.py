"""Settings of one measurement of training."""

import dataclasses
import re

PRECISIONS = ('fp32', 'fp16', 'bf16')


@dataclasses.dataclass(frozen=True)
class Trial:
    """A model that one system trains for some steps on one batch.

    For ``model`` see :func:`training.models.build_task`, for ``system``
    :func:`training.systems.parse_system`. The size of images is height and
    width, the precision is autocast's. With a timeline the memory is followed
    through one step, and ``trace`` is a file for a trace of two steps.
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
        size = '{}x{}'.format(*self.image_size)
        name = f'{short_name(self.model)} {self.system}'
        return f'{name}, batch {self.batch_size} of {size}'


def short_name(model):
    """Name of a model without its folder."""
    return model.rpartition('/')[2]


def file_name(text):
    """Text as the name of a file."""
    return re.sub(r'[^\w.-]', '_', text)
