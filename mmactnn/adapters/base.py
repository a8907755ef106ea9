"""What the parts of models that call layers have in common."""

from torch import nn


class LayeredModule:
    """Mixin of modules that call layers where their parent calls functions.

    A function cannot be converted, a layer can. The layers have neither
    parameters nor buffers, so that a layered module has its parent's
    ``state_dict`` keys, and any instance of the parent can become one by
    :meth:`convert_`, and its parent again by :meth:`revert_`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, layer in self.make_layers(self).items():
            self.add_module(name, layer)

    @classmethod
    def make_layers(cls, module):
        """The layers that stand for the functions that a module calls.

        Args:
            module (nn.Module): An instance of this class or its parent.

        Returns:
            dict[str, QuantizedLayer]: New layers by their names in the
            module; none if it calls no function that keeps anything.
        """
        raise NotImplementedError

    @classmethod
    def convert_(cls, module, layers):
        """Turn an instance of the parent into this class, in place.

        Args:
            module (nn.Module): The module to convert.
            layers (dict[str, nn.Module]): What :meth:`make_layers` made for
                it, or their plain twins.
        """
        for name, layer in layers.items():
            module.add_module(name, layer)
        module.__class__ = cls

    def revert_(self):
        """Turn this module into its parent, in place."""
        for name in self.make_layers(self):
            delattr(self, name)
        self.__class__ = self.plain_class

    @property
    def plain_class(self):
        """type: What :meth:`revert_` makes of this module."""
        return next(
            base
            for base in type(self).__mro__[1:]
            if issubclass(base, nn.Module)
            and not issubclass(base, LayeredModule)
        )
