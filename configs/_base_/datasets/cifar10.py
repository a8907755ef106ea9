# CIFAR-10 as written by tools/dataset_converters/cifar10.py, for training in
# large batches with mmpretrain's crops and flips.
_base_ = ['mmpretrain::_base_/datasets/cifar10_bs16.py']

# The converter's files hold the images. The stock class of the data set would
# read published files only, by their checksums.
train_dataloader = dict(
    batch_size=512,
    num_workers=4,
    persistent_workers=True,
    # The rest of an epoch would be a batch of 336 images.
    drop_last=True,
    dataset=dict(
        _delete_=True,
        type='BaseDataset',
        data_root='data/cifar10/',
        ann_file='train.pkl',
        data_prefix=dict(),
        pipeline=_base_.train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=500,
    num_workers=1,
    persistent_workers=True,
    dataset=dict(
        _delete_=True,
        type='BaseDataset',
        data_root='data/cifar10/',
        ann_file='test.pkl',
        data_prefix=dict(),
        pipeline=_base_.test_pipeline,
    ),
)
test_dataloader = val_dataloader
