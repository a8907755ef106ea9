# The recipe of the ActNN paper (arXiv:2104.14129): MoCo v2 ResNet-50 on
# ImageNet-1k, 256 images on each of 2 GPUs. The official recipe
# (mocov2_r50.py) has 32 on each of 8.
#
#   bash tools/dist_train.sh configs/actnn/mocov2_r50_paper.py 2
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = './mocov2_r50.py'

train_dataloader = dict(batch_size=256)
# Twice as many images in a step, twice the learning rate.
optim_wrapper = dict(optimizer=dict(lr=0.06))
auto_scale_lr = dict(base_batch_size=512)
