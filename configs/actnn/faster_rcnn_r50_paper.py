# The recipe of the ActNN paper (arXiv:2104.14129): Faster R-CNN R50-FPN 1x on
# COCO with no stage frozen, batch normalization in training mode, and all 16
# images of a step on one GPU. Its results do not compare with those of the
# official recipe (faster_rcnn_r50.py), which freezes both.
#
#   python tools/train.py configs/actnn/faster_rcnn_r50_paper.py
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = './faster_rcnn_r50.py'

model = dict(backbone=dict(frozen_stages=-1, norm_eval=False))

# 16 images in total, as in the official recipe, so its learning rate stays.
train_dataloader = dict(batch_size=16, num_workers=8)
