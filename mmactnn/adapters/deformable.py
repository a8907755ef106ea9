"""Adapter of MMCV's multi-scale deformable attention."""

import torch
from mmcv.ops import multi_scale_deform_attn as mmcv_attention

from ..layers import QDeformableSampling
from ..registry import register_adapter
from .base import Adapter


@register_adapter(
    mmcv_attention.MultiScaleDeformableAttention,
    fingerprints=['a2c71a3b02b8b05f'],
)
class QMultiScaleDeformableAttention(
    Adapter, mmcv_attention.MultiScaleDeformableAttention
):
    """MMCV's deformable attention whose sampling is a layer.

    Args:
        *args: As ``MultiScaleDeformableAttention``.
        **kwargs: As ``MultiScaleDeformableAttention``.
    """

    @classmethod
    def make_layers(cls, module):
        """See the base class."""
        return dict(sampling=QDeformableSampling())

    def _can_adapt(self, args, kwargs):
        # Other arguments are optional, and passed on by callers that know
        # nothing of them.
        tensors = [
            x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)
        ]
        return bool(tensors) and super()._can_adapt(tensors, {})

    def adapted_forward(
        self,
        query,
        key=None,
        value=None,
        identity=None,
        query_pos=None,
        key_padding_mask=None,
        reference_points=None,
        spatial_shapes=None,
        level_start_index=None,
        **kwargs,
    ):
        """See ``MultiScaleDeformableAttention``."""
        value = query if value is None else value
        identity = query if identity is None else identity
        if query_pos is not None:
            query = query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        samples, length = query.shape[:2]
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        shape = samples, length, self.num_heads, self.num_levels
        offsets = self.sampling_offsets(query)
        offsets = offsets.view(*shape, self.num_points, 2)
        logits = self.attention_weights(query).view(*shape[:3], -1)
        locations = self._locations(offsets, reference_points, spatial_shapes)

        def sample(value, locations, weights):
            if not _has_kernel(value):
                return mmcv_attention.multi_scale_deformable_attn_pytorch(
                    value, spatial_shapes, locations, weights
                )
            return mmcv_attention.MultiScaleDeformableAttnFunction.apply(
                value,
                spatial_shapes,
                level_start_index,
                locations,
                weights,
                self.im2col_step,
            )

        output = self.output_proj(
            self.sampling(value, locations, logits, sample)
        )
        if not self.batch_first:
            output = output.transpose(0, 1)
        return self.dropout(output) + identity

    def _locations(self, offsets, points, spatial_shapes):
        """Sampling locations from offsets and reference points or boxes."""
        if points.shape[-1] not in (2, 4):
            raise ValueError(
                'reference points must have 2 or 4 coordinates, got '
                f'{points.shape[-1]}'
            )
        points = points[:, :, None, :, None]
        if points.shape[-1] == 2:
            sizes = spatial_shapes.flip(-1)[None, None, None, :, None]
            return points + offsets / sizes
        step = offsets / self.num_points * points[..., 2:] * 0.5
        return points[..., :2] + step


def _has_kernel(value):
    """Whether MMCV would run its kernel."""
    return (
        mmcv_attention.IS_CUDA_AVAILABLE
        and value.is_cuda
        and value.dtype != torch.bfloat16
    )
