"""What everything that computes a forward pass has in common."""

import torch


class Fusion:
    """Computes the forward pass of a module in its place.

    The object takes the place of the module's ``forward``, as an attribute of
    the instance that copies and pickles go along with.

    Args:
        module (nn.Module): The module.
    """

    def __init__(self, module):
        self.module = module

    def install(self):
        """Compute the module's forward pass from now on."""
        self.module.forward = self

    @property
    def norms(self):
        """list[nn.Module]: All normalisations that are fused."""
        return []

    @property
    def relus(self):
        """list[nn.Module]: The ReLUs that keep codes, behind a convolution."""
        return []

    def adopt(self, layers):
        """Take note of layers that the module is about to get.

        Args:
            layers (dict[str, nn.Module]): The layers by their names in it.
        """

    def rectified_bits(self, level):
        """The bits that a level gives to what is rectified here.

        Args:
            level (Level): The level.

        Returns:
            int: Bits an element, the sign included.
        """
        return level.rectified

    def keep(self, is_norm, is_relu):
        """Leave out what is not made of compressed layers.

        Args:
            is_norm (Callable): Tells whether a module is or will be a
                normalisation that can be fused ...
            is_relu (Callable): ... and the same of ReLU.

        Returns:
            Fusion, optional: This object; None if nothing is left.
        """
        raise NotImplementedError

    def __call__(self, *args, **kwargs):
        """See the module's own ``forward``."""
        raise NotImplementedError

    def _unfused(self, *args, **kwargs):
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def is_active(self):
        """bool: Whether the module is being trained."""
        return (
            self.module.training
            and torch.is_grad_enabled()
            and not torch.jit.is_tracing()
        )
