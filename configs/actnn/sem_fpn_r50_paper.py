# The recipe of the ActNN paper (arXiv:2104.14129): Semantic FPN R50 80k on
# Cityscapes with all 8 images of a step on one GPU, plain batch normalization
# and clipped gradients. The official recipe (sem_fpn_r50.py) has 2 images on
# each of 4 GPUs and batch normalization across them.
#
#   python tools/train.py configs/actnn/sem_fpn_r50_paper.py
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = './sem_fpn_r50.py'

model = dict(
    backbone=dict(norm_cfg=_base_.actnn.norm_cfg),
    decode_head=dict(norm_cfg=_base_.actnn.norm_cfg),
)

# 8 images in total, as in the official recipe, so its learning rate stays.
train_dataloader = dict(batch_size=8, num_workers=4)
optim_wrapper = dict(clip_grad=dict(_delete_=True, max_norm=35, norm_type=2))
