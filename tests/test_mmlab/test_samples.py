"""Indices of a batch's samples, for levels with ``use_gradient``."""

import pytest
import torch
from mmengine.dataset import (
    ClassBalancedDataset,
    ConcatDataset,
    RepeatDataset,
    pseudo_collate,
)
from support.layers import assert_same_bits, exact_numerics
from support.toy import ITERATIONS, SAMPLES, make_runner
from support.toy_samples import ToySamples, sample_dataloader

from mmactnn.mmlab.samples import SampleIndex

ACTNN = dict(type='ActNNHook', level=dict(use_gradient=True, fuse=False))
RECORD = dict(type='RecordingHook')
KEYS = ['img_path', 'img_id', 'sample_idx']
MODEL = dict(type='SampleClassifier')
PLAIN = dict(type='ToySamples')
DATASET_CONFIGS = dict(
    plain=PLAIN,
    repeated=dict(type='RepeatDataset', dataset=PLAIN, times=2),
    balanced=dict(
        type='ClassBalancedDataset', dataset=PLAIN, oversample_thr=0.2
    ),
    concatenated=dict(
        type='ConcatDataset',
        datasets=[dict(PLAIN, size=5, folder='b', first_id=500), PLAIN],
    ),
)


@pytest.fixture(autouse=True)
def _exact_numerics():
    with exact_numerics():
        yield


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda _: None)


def lookup(dataset, places):
    """Indices of items of a dataset."""
    batch = pseudo_collate([dataset[i] for i in places])
    return SampleIndex(dataset).lookup(batch)


def history_of(path):
    checkpoint = torch.load(path, map_location='cpu', weights_only=False)
    return checkpoint['actnn']['precision']['history']


def losses(runner):
    (hook,) = (h for h in runner.hooks if type(h).__name__ == 'RecordingHook')
    return hook.losses


class TestIndex:
    @pytest.mark.parametrize('key', KEYS)
    @pytest.mark.parametrize('lazy', [False, True])
    def test_plain(self, key, lazy):
        dataset = ToySamples(meta_keys=[key], lazy_init=lazy)
        index = SampleIndex(dataset)
        assert len(index) == 12
        assert lookup(dataset, [3, 0, 11, 3]) == [3, 0, 11, 3]

    def test_subset(self):
        dataset = ToySamples(meta_keys=['img_id'], indices=[2, 5, 7])
        assert len(SampleIndex(dataset)) == 3
        assert lookup(dataset, [2, 0]) == [2, 0]

    @pytest.mark.parametrize('key', KEYS)
    def test_repeated(self, key):
        dataset = RepeatDataset(ToySamples(meta_keys=[key]), times=3)
        assert len(dataset) == 36
        assert len(SampleIndex(dataset)) == 12
        assert lookup(dataset, [5, 17, 35, 12]) == [5, 5, 11, 0]

    @pytest.mark.parametrize('key', KEYS)
    def test_class_balanced(self, key):
        dataset = ClassBalancedDataset(ToySamples(meta_keys=[key]), 0.2)
        assert dataset.repeat_indices == [*range(12), 11]
        assert len(SampleIndex(dataset)) == 12
        assert lookup(dataset, [12, 11, 4]) == [11, 11, 4]

    @pytest.mark.parametrize('key', ['img_path', 'img_id'])
    def test_concatenated(self, key):
        """Both have a ``sample_idx`` from 0 on."""
        first = ToySamples(size=5, meta_keys=[key, 'sample_idx'])
        second = ToySamples(
            folder='b', first_id=500, meta_keys=[key, 'sample_idx']
        )
        dataset = ConcatDataset([first, second])
        assert len(SampleIndex(dataset)) == 17
        assert lookup(dataset, [0, 5, 4, 16]) == [0, 5, 4, 16]

    def test_nested(self):
        parts = [
            dict(type='RepeatDataset', dataset=dict(PLAIN, size=5), times=2),
            dict(DATASET_CONFIGS['balanced'], dataset=dict(PLAIN, folder='b')),
        ]
        whole = dict(type='ConcatDataset', datasets=parts)
        dataset = RepeatDataset(whole, times=2)
        assert len(dataset) == 2 * (10 + 13)
        assert len(SampleIndex(dataset)) == 17
        # The seventh of 5 images twice; the last image, once more; the first
        # image of all, in the second round.
        assert lookup(dataset, [6, 22, 23]) == [1, 16, 0]

    def test_the_path_goes_before_the_id(self):
        dataset = ConcatDataset([ToySamples(), ToySamples(folder='b')])
        assert lookup(dataset, [2, 14]) == [2, 14]

    def test_one_dataset_twice_is_one_set_of_images(self):
        parts = [ToySamples(meta_keys=['img_id']) for _ in range(2)]
        assert lookup(ConcatDataset(parts), [2, 14]) == [2, 2]


class TestRefusals:
    WORDS = "cannot tell which sample.*'img_path', 'img_id'.*packs"

    def test_concatenated_by_sample_idx(self):
        parts = [
            ToySamples(folder=folder, meta_keys=['sample_idx'])
            for folder in 'ab'
        ]
        with pytest.raises(RuntimeError, match=self.WORDS + ' sample_idx'):
            lookup(ConcatDataset(parts), [0])

    def test_concatenated_with_equal_ids(self):
        parts = [
            ToySamples(folder=folder, meta_keys=['img_id']) for folder in 'ab'
        ]
        with pytest.raises(RuntimeError, match=self.WORDS + ' img_id'):
            lookup(ConcatDataset(parts), [14])

    def test_nothing_is_packed(self):
        with pytest.raises(RuntimeError, match=self.WORDS):
            lookup(ToySamples(meta_keys=[]), [0])

    def test_annotations_without_what_is_packed(self):
        dataset = ToySamples(info_keys=[], meta_keys=['img_path'])
        with pytest.raises(RuntimeError, match=self.WORDS):
            lookup(dataset, [0])

    def test_batch_without_samples(self):
        index = SampleIndex(ToySamples())
        with pytest.raises(RuntimeError, match='got the keys inputs, labels'):
            index.lookup(dict(inputs=[], labels=[]))

    def test_batch_that_is_no_dict(self):
        index = SampleIndex(ToySamples())
        with pytest.raises(RuntimeError, match="'data_samples', got list"):
            index.lookup([torch.zeros(2)])

    def test_under_the_runner(self, tmp_path):
        """The toy's own batches have no data samples."""
        runner = make_runner(tmp_path, ACTNN)
        with pytest.raises(RuntimeError, match="needs batches with 'data_s"):
            runner.train()


def sample_runner(work_dir, *hooks, dataset=PLAIN, **kwargs):
    return make_runner(
        work_dir,
        *hooks,
        model=MODEL,
        train_dataloader=sample_dataloader(dataset),
        **kwargs,
    )


class TestRun:
    @pytest.mark.parametrize('name', DATASET_CONFIGS)
    def test_history_of_the_samples_seen(self, name, tmp_path):
        runner = sample_runner(
            tmp_path,
            ACTNN,
            dict(type='SeenHook'),
            dataset=DATASET_CONFIGS[name],
            train_cfg=dict(by_epoch=False, max_iters=2),
            by_epoch=False,
        )
        runner.train()
        history = history_of(tmp_path / 'iter_2.pth')
        paths = [f'a/{i}.png' for i in range(SAMPLES)]
        if name == 'concatenated':
            paths = [f'b/{i}.png' for i in range(5)] + paths
        # Two convolutions, a normalisation and a linear layer.
        assert history.shape == (len(paths), 4)
        (hook,) = (h for h in runner.hooks if type(h).__name__ == 'SeenHook')
        assert len(hook.paths) == 8
        changed = history.ne(1).any(1).tolist()
        assert changed == [path in hook.paths for path in paths]
        assert history.isfinite().all()
        assert not all(changed)

    def test_without_it_there_is_no_history(self, tmp_path):
        sample_runner(tmp_path, dict(ACTNN, level='L3')).train()
        assert history_of(tmp_path / 'epoch_1.pth') is None

    def test_history_matters(self, tmp_path):
        """Else the test below could not fail."""
        found = []
        for level in (dict(fuse=False), dict(use_gradient=True, fuse=False)):
            runner = sample_runner(
                tmp_path, dict(ACTNN, level=level), RECORD, epochs=4
            )
            runner.train()
            found.append(losses(runner))
        assert found[0][0] == found[1][0]
        assert found[0] != found[1]

    @pytest.mark.parametrize('name', ['plain', 'concatenated'])
    def test_resumed(self, name, tmp_path):
        options = dict(dataset=DATASET_CONFIGS[name], epochs=4)
        whole = sample_runner(tmp_path / 'whole', ACTNN, RECORD, **options)
        whole.train()
        expected = losses(whole)
        per_epoch = len(expected) // 4
        assert per_epoch >= ITERATIONS

        stop = dict(type='RecordingHook', stop_at=2 * per_epoch + 1)
        killed = sample_runner(tmp_path / 'part', ACTNN, stop, **options)
        with pytest.raises(KeyboardInterrupt):
            killed.train()
        resumed = sample_runner(
            tmp_path / 'part', ACTNN, RECORD, resume=True, **options
        )
        resumed.train()
        assert min(losses(resumed)) == 2 * per_epoch
        for iteration, loss in losses(resumed).items():
            assert loss == expected[iteration]
        for key, value in resumed.model.state_dict().items():
            assert_same_bits(value, whole.model.state_dict()[key])
        histories = [
            history_of(tmp_path / run / 'epoch_4.pth')
            for run in ('whole', 'part')
        ]
        assert_same_bits(*histories)
        assert histories[0].ne(1).any(1).all()
