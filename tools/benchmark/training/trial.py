"""What is measured once, in a process of its own."""

import dataclasses

PRECISIONS = ('fp32', 'fp16', 'bf16')

# What can become of a trial.
OK = 'ok'
OUT_OF_MEMORY = 'out of memory'
TIMEOUT = 'timeout'
ERROR = 'error'

# These say something about what was measured; the others are tried again.
FINISHED = (OK, OUT_OF_MEMORY)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A model that one system trains for some steps on one batch.

    Attributes:
        model (str): Model, see :func:`training.models.build_task`.
        system (str): System, see :func:`training.systems.parse_system`.
        batch_size (int): Images in the batch.
        image_size (tuple[int, int]): Height and width of the images.
        precision (str): One of ``PRECISIONS``; those of 16 bits are
            autocast's.
        channels_last (bool): Whether images and weights are in that layout.
        cfg_options (tuple[str]): Overrides ``KEY=VALUE`` of the settings of
            a model that is a config.
        device (str): Where to train.
        warmup (int): Steps before those that count.
        steps (int): Steps that count.
        memory_limit_mib (float, optional): Most memory that the CUDA
            allocator may take. Defaults to all there is.
        timeline (bool): Whether the memory is followed through one step.
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

    @classmethod
    def from_dict(cls, values):
        """The trial that a dict, or the row of a result, holds.

        Args:
            values (dict): Attributes by name, and perhaps other entries.

        Returns:
            Trial: The trial. Lists have become tuples.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(
            **{
                name: tuple(values[name])
                if isinstance(values[name], list)
                else values[name]
                for name in names
                if name in values
            }
        )
