"""A data set whose samples tell which they are."""

import torch
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, TRANSFORMS
from mmengine.structures import BaseDataElement
from torch import nn

SAMPLES = 8


@TRANSFORMS.register_module()
class PackSampled:
    """Makes an image of its number, and a data sample.

    Args:
        meta_keys (Sequence[str]): What the data sample tells.
    """

    def __init__(self, meta_keys):
        self.meta_keys = meta_keys

    def __call__(self, results):
        """See MMEngine's transforms."""
        seed = results['number']
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(3, 8, 8, generator=generator) * (1 + seed % 3)
        metainfo = {key: results[key] for key in self.meta_keys}
        return dict(
            inputs=image, data_samples=BaseDataElement(metainfo=metainfo)
        )


@DATASETS.register_module()
class Sampled(BaseDataset):
    """Images of consecutive numbers.

    Args:
        first (int): Number of the first one.
        **kwargs: For the base class.
    """

    def __init__(self, first=0, **kwargs):
        self.first = first
        super().__init__(**kwargs)

    def load_data_list(self):
        """See ``BaseDataset``."""
        numbers = range(self.first, self.first + SAMPLES)
        return [
            dict(number=n, img_id=n - self.first, img_path=f'{n}.png')
            for n in numbers
        ]

    def get_cat_ids(self, idx):
        """As ``ClassBalancedDataset`` asks."""
        return [idx % 2]


@MODELS.register_module()
class SampledModel(BaseModel):
    """Two convolutions."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 3)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        """See ``BaseModel``."""
        x = torch.stack(inputs)
        out = self.conv2(self.norm(self.conv1(x)).relu())
        return dict(loss=out.square().mean()) if mode == 'loss' else out
