"""The stock recipes behind the ones that are shipped."""

from mmengine.config import Config

# Recipes that only add compression to one of a toolbox.
OFFICIAL = {
    'atss_r50': 'mmdet::atss/atss_r50_fpn_1x_coco.py',
    'byol_r50': 'mmpretrain::byol/byol_resnet50_16xb256-coslr-200e_in1k.py',
    'cascade_rcnn_r50': 'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'convnext_t_in1k': 'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py',
    'deeplabv3plus_r50': (
        'mmseg::deeplabv3plus/'
        'deeplabv3plus_r50-d8_4xb2-80k_cityscapes-512x1024.py'
    ),
    'deformable_detr_r50': (
        'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
    ),
    'detr_r50': 'mmdet::detr/detr_r50_8xb2-150e_coco.py',
    'dino_r50': 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    'efficientnet_b0_in1k': (
        'mmpretrain::efficientnet/efficientnet-b0_8xb32_in1k.py'
    ),
    'faster_rcnn_r50': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'fcn_hr48': 'mmseg::hrnet/fcn_hr48_4xb2-80k_cityscapes-512x1024.py',
    'fcn_r50': 'mmseg::fcn/fcn_r50-d8_4xb2-80k_cityscapes-512x1024.py',
    'fcos_r50': 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'mae_vit_b': (
        'mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py'
    ),
    'mask2former_r50': (
        'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
    ),
    'mask2former_r50_ade20k': (
        'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'
    ),
    'mask_rcnn_convnext_t': (
        'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'
    ),
    'mask_rcnn_r50': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'mask_rcnn_swin_t': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'mobilenet_v3_in1k': (
        'mmpretrain::mobilenet_v3/mobilenet-v3-large_8xb128_in1k.py'
    ),
    'mocov2_r50': (
        'mmpretrain::mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.py'
    ),
    'pspnet_r50': (
        'mmseg::pspnet/pspnet_r50-d8_4xb2-80k_cityscapes-512x1024.py'
    ),
    'resnet50_cifar10': 'mmpretrain::resnet/resnet50_8xb16_cifar10.py',
    'resnet50_in1k': 'mmpretrain::resnet/resnet50_8xb32_in1k.py',
    'retinanet_r101': 'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py',
    'retinanet_r50': 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'retinanet_x101_64x4d': (
        'mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py'
    ),
    'rtmdet_l': 'mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
    'rtmdet_s': 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
    'segformer_b0': (
        'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
    ),
    'segformer_b2': (
        'mmseg::segformer/segformer_mit-b2_8xb2-160k_ade20k-512x512.py'
    ),
    'segnext_t': (
        'mmseg::segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py'
    ),
    'sem_fpn_r50': 'mmseg::sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024.py',
    'simclr_r50': (
        'mmpretrain::simclr/simclr_resnet50_16xb256-coslr-200e_in1k.py'
    ),
    'swin_t_in1k': 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
    'upernet_r50': (
        'mmseg::upernet/upernet_r50_4xb2-80k_cityscapes-512x1024.py'
    ),
    'upernet_swin_t': (
        'mmseg::swin/'
        'swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
    ),
    'vit_b_in1k': 'mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k.py',
    'yolox_s': 'mmdet::yolox/yolox_s_8xb8-300e_coco.py',
}

_PLAIN = {
    'QBN2d': 'BN',
    'QFPN': 'FPN',
    'QGN': 'GN',
    'QRPNHead': 'RPNHead',
    'QReLU': 'ReLU',
    'QSiLU': 'SiLU',
    'QSyncBN': 'SyncBN',
}


def official(name):
    """A toolbox's own config of a recipe.

    Args:
        name (str): Name of ours, a key of :data:`OFFICIAL`.

    Returns:
        Config: The config.
    """
    # As a base, which is how ours have it.
    return Config.fromstring(f'_base_ = {OFFICIAL[name]!r}', '.py')


def plain(node):
    """A model's config without the names of compressed types.

    Args:
        node (dict | list | Any): The config or a part of it.

    Returns:
        dict | list | Any: A copy.
    """
    if isinstance(node, dict):
        found = {key: plain(value) for key, value in node.items()}
        if found.get('conv_cfg') == dict(type='QConv2d'):
            del found['conv_cfg']
        if isinstance(found.get('type'), str):
            found['type'] = _PLAIN.get(found['type'], found['type'])
        return found
    if isinstance(node, (list, tuple)):
        return type(node)(plain(item) for item in node)
    return node
