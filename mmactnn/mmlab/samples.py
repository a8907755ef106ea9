"""Indices of a batch's samples in the dataset."""


class SampleIndex:
    """Numbers the samples of a dataset, through wrappers and concatenations.

    Samples are identified by the path of the image, else by ``img_id``, else
    by ``sample_idx``, depending on what the pipeline packs. Repeated samples
    have equal indices; indices of concatenated datasets are consecutive.

    Args:
        dataset (Dataset): MMEngine dataset of any OpenMMLab package.
    """

    _KEYS = ('img_path', 'img_id')

    def __init__(self, dataset):
        self._leaves = list(_leaves(dataset))
        self._places = None

    def __len__(self):
        return sum(len(leaf) for leaf in self._leaves)

    def lookup(self, data_batch):
        """Find the indices of a batch's samples.

        Args:
            data_batch (dict): From the data loader, with ``data_samples``.

        Returns:
            list[int]: An index for each sample, 0 to ``len(self) - 1``.

        Raises:
            RuntimeError: If the samples have no identification.
        """
        if not isinstance(data_batch, dict):
            raise RuntimeError(
                "use_gradient needs batches that are dicts with 'data_samples'"
                f', got {type(data_batch).__name__}'
            )
        samples = data_batch.get('data_samples')
        if samples is None:
            raise RuntimeError(
                "use_gradient needs batches with 'data_samples', got the keys "
                f'{", ".join(map(str, data_batch))}'
            )
        return [self._find(sample) for sample in samples]

    def _find(self, sample):
        for key in self._KEYS:
            place = self._known(key).get(sample.get(key))
            if place is not None:
                return place
        place = sample.get('sample_idx')
        if place is None or len(self._leaves) > 1:
            raise RuntimeError(
                'use_gradient cannot tell which sample this is: let the '
                "pipeline pack 'img_path', 'img_id' or (without concatenated "
                "datasets) 'sample_idx' as meta_keys; it packs "
                f'{", ".join(sample.metainfo_keys())}'
            )
        return int(place)

    def _known(self, key):
        if self._places is None:
            self._places = self._read()
        return self._places[key]

    def _read(self):
        """Read identifications of all samples, without images."""
        places = {key: {} for key in self._KEYS}
        paths = {}
        start = 0
        for leaf in self._leaves:
            if hasattr(leaf, 'get_data_info'):
                for i in range(len(leaf)):
                    info = leaf.get_data_info(i)
                    for key in self._KEYS:
                        if key in info:
                            places[key].setdefault(info[key], start + i)
                    # Two datasets may give one number to different images;
                    # such a number is ambiguous.
                    name, path = info.get('img_id'), info.get('img_path')
                    if paths.setdefault(name, path) != path:
                        places['img_id'][name] = None
            start += len(leaf)
        return places


def _leaves(dataset):
    if hasattr(dataset, 'datasets'):
        for part in dataset.datasets:
            yield from _leaves(part)
    elif hasattr(dataset, 'dataset'):
        yield from _leaves(dataset.dataset)
    else:
        yield dataset
