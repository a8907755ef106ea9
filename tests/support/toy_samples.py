"""Datasets whose batches hold data samples, and a model for them."""

import torch
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, MODELS
from mmengine.structures import BaseDataElement

from .toy import ToyClassifier

META_KEYS = ('img_path', 'img_id', 'sample_idx')


class Pack:
    """Makes an image and packs meta information, as pipelines do.

    Args:
        meta_keys (Sequence[str]): What to pack of it.
    """

    def __init__(self, meta_keys):
        self.meta_keys = meta_keys

    def __call__(self, info):
        generator = torch.Generator().manual_seed(info['seed'])
        # Unequal contrast, so that gradients differ.
        scale = 4 ** (info['seed'] % 4 - 2)
        image = scale * torch.randn(3, 16, 16, generator=generator)
        meta = {key: info[key] for key in self.meta_keys if key in info}
        sample = BaseDataElement(metainfo=meta)
        sample.label = info['label']
        return dict(inputs=image, data_samples=sample)


@DATASETS.register_module()
class ToySamples(BaseDataset):
    """Random images with the usual meta information.

    Args:
        size (int, optional): Images. Defaults to 12.
        folder (str, optional): Where they seem to be. Defaults to ``'a'``.
        first_id (int, optional): ``img_id`` of the first. Defaults to 100.
        info_keys (Sequence[str], optional): What annotations hold of the
            path and the id. Defaults to both.
        meta_keys (Sequence[str], optional): What the pipeline packs.
            Defaults to everything.
        **kwargs: As the base class.
    """

    def __init__(
        self,
        size=12,
        folder='a',
        first_id=100,
        info_keys=META_KEYS,
        meta_keys=META_KEYS,
        **kwargs,
    ):
        self.size = size
        self.folder = folder
        self.first_id = first_id
        self.info_keys = info_keys
        super().__init__(pipeline=[Pack(meta_keys)], **kwargs)

    def load_data_list(self):
        """See the base class."""
        infos = []
        for i in range(self.size):
            # Not in the order of their places.
            image_id = self.first_id + self.size - 1 - i
            info = dict(img_path=f'{self.folder}/{i}.png', img_id=image_id)
            info = {k: v for k, v in info.items() if k in self.info_keys}
            # The last image is the only one of its class.
            label = 3 if i == self.size - 1 else i % 3
            infos.append(dict(info, label=label, seed=i))
        return infos

    def get_cat_ids(self, idx):
        """For ``ClassBalancedDataset``."""
        return [self.get_data_info(idx)['label']]


@MODELS.register_module()
class SampleClassifier(ToyClassifier):
    """Takes its labels from data samples."""

    def forward(self, inputs, data_samples=None, mode='tensor'):
        labels = None
        if data_samples is not None:
            labels = torch.tensor([sample.label for sample in data_samples])
        return super().forward(torch.stack(inputs), labels, mode)


@HOOKS.register_module()
class SeenHook(Hook):
    """Remembers the paths of the images that were trained on."""

    def __init__(self):
        self.paths = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.paths += [s.img_path for s in data_batch['data_samples']]


def sample_dataloader(dataset, batch_size=4, shuffle=True):
    """The config of a data loader.

    Args:
        dataset (dict): Config of the dataset.
        batch_size (int, optional): Defaults to 4.
        shuffle (bool, optional): Defaults to True.

    Returns:
        dict: The config.
    """
    return dict(
        batch_size=batch_size,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=shuffle),
        dataset=dataset,
        collate_fn=dict(type='pseudo_collate'),
    )
