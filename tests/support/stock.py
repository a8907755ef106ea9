"""The stock recipes behind the ones that are shipped."""

from mmengine.config import Config

# Those that add compression to a recipe of MMDetection and change nothing.
OFFICIAL = {
    'atss_r50': 'atss/atss_r50_fpn_1x_coco.py',
    'cascade_rcnn_r50': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'detr_r50': 'detr/detr_r50_8xb2-150e_coco.py',
    'faster_rcnn_r50': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'fcos_r50': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'mask_rcnn_r50': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'retinanet_r50': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'retinanet_r101': 'retinanet/retinanet_r101_fpn_1x_coco.py',
    'retinanet_x101_64x4d': 'retinanet/retinanet_x101-64x4d_fpn_1x_coco.py',
    'rtmdet_s': 'rtmdet/rtmdet_s_8xb32-300e_coco.py',
    'yolox_s': 'yolox/yolox_s_8xb8-300e_coco.py',
}

_PLAIN = {
    'QBN2d': 'BN',
    'QFPN': 'FPN',
    'QGN': 'GN',
    'QRPNHead': 'RPNHead',
    'QSiLU': 'SiLU',
    'QSyncBN': 'SyncBN',
}


def official(name):
    """MMDetection's own config of a recipe.

    Args:
        name (str): Name of ours, a key of :data:`OFFICIAL`.

    Returns:
        Config: The config.
    """
    # As a base, which is how ours have it.
    return Config.fromstring(f"_base_ = 'mmdet::{OFFICIAL[name]}'", '.py')


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
