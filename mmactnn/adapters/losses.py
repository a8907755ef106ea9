"""Adapters of heads whose losses keep the gradients of its outputs alone."""

from ..layers import QLosses
from .base import Adapter


class LossAdapter(Adapter):
    """Mixin of heads of OpenMMLab that have a method ``loss_by_feat``.

    The method gets the outputs of the head, and runs as a
    :class:`mmactnn.QLosses`. Subclasses with an :meth:`adapted_forward`
    replace the forward pass, too.
    """

    @classmethod
    def _take_over(cls, parent):
        cls._functions = {}
        if cls.adapted_forward is not Adapter.adapted_forward:
            super()._take_over(parent)

    @classmethod
    def is_complete(cls):
        """See the base class."""
        if cls.adapted_forward is not Adapter.adapted_forward:
            return super().is_complete()
        return hasattr(cls.plain_class, 'loss_by_feat')

    @classmethod
    def make_layers(cls, module):
        """See the base class."""
        return dict(losses_of_outputs=QLosses())

    def loss_by_feat(self, *args, **kwargs):
        """See the parent."""
        layer = self._modules.get('losses_of_outputs')
        if layer is None:
            return super().loss_by_feat(*args, **kwargs)
        return layer(super().loss_by_feat, *args, **kwargs)
