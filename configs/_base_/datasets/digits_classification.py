# Single handwritten digits on plain dark ground, 32x32 pixels, made by
#
#   python tools/dataset_converters/digits.py data/digits_classes \
#       --layout classes
#
# 3000 images train, 1000 validate. Nothing in the pipeline is random: a
# mirrored digit is another digit or none.
dataset_type = 'CustomDataset'
data_root = 'data/digits_classes/'
data_preprocessor = dict(
    num_classes=10,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)

pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]

# Decoding these small images costs less than a worker process would.
train_dataloader = dict(
    batch_size=125,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix='train',
        pipeline=pipeline,
    ),
)
val_dataloader = dict(
    batch_size=250,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix='val',
        pipeline=pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator
