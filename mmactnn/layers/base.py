"""Base classes of the compressed layers."""

import copy

import torch
from torch import nn

from ..codes.quantizer import LayerQuantizer, OwnSettings
from ..config import DEFAULT_LEVEL
from ..modules.class_swap import derive, replace_class, wrapped_class
from ..modules.execution import refuse_script
from ..ops import DEFAULT_GROUP_SIZE
from ..registry import is_alias


class QuantizedLayer:
    """Mixin of the compressed layers.

    A compressed layer is a subclass of its torch parent with the same
    parameters, buffers and ``state_dict`` keys; it only adds the attribute
    ``quantizer``. :meth:`convert_` therefore turns any instance of the parent
    into a compressed layer, and :meth:`revert_` back.

    Attributes:
        quantizer (LayerQuantizer): Settings of this layer.
    """

    # Field of a level with the bits of this kind; set by subclasses.
    kind = None
    # Whether adaptive levels allocate the bits of this kind of layer.
    shares_bits = True
    # Whether it also keeps codes in eval mode while the model is trained.
    keeps_codes_frozen = False

    __prepare_scriptable__ = refuse_script

    def _init_quantizer(self, bits, group_size):
        """Set up ``quantizer`` at the end of a constructor.

        Args:
            bits (int, optional): Bits a code, whatever the level; None
                follows the level.
            group_size (int, optional): Elements a range; None follows the
                model.

        Raises:
            ValueError: If bits or group size are not valid.
        """
        self.quantizer = self._make_quantizer(bits, group_size)

    @classmethod
    def _make_quantizer(cls, bits, group_size):
        return LayerQuantizer.for_level(
            cls,
            DEFAULT_LEVEL,
            DEFAULT_GROUP_SIZE,
            generator=None,
            own=OwnSettings(bits, group_size),
        )

    @classmethod
    def level_bits(cls, level):
        """Bits of this kind of layer at a level.

        Args:
            level (Level): The level.

        Returns:
            int, optional: Bits a code; None for exact.
        """
        return getattr(level, cls.kind)

    @classmethod
    def rule_bits(cls, rule):
        """Bits of this kind of layer by a rule for its name.

        Args:
            rule (Rule): The rule.

        Returns:
            int, optional: Bits a code; None for exact.
        """
        return rule.bits

    @classmethod
    def convert_(cls, module, quantizer):
        """Turn an instance of the torch parent into this class, in place.

        Parameters, buffers, hooks and references to the module stay valid.
        An instance of a subclass of the parent gets a class with both as
        bases, and so keeps the additions of the subclass.

        Args:
            module (nn.Module): The layer to convert.
            quantizer (LayerQuantizer): Its settings.
        """
        plain = wrapped_class(type(module))
        module.__dict__['_converted_from'] = plain
        parent = cls.torch_class()
        derives = plain is not parent and issubclass(plain, parent)
        if derives and not is_alias(cls, plain):
            replace_class(module, plain, derive(cls, plain))
        else:
            replace_class(module, plain, cls)
        module.quantizer = quantizer

    def revert_(self):
        """Turn this layer into a plain one, in place.

        Returns:
            type: Its class now: the one that it was converted from, or the
            torch parent.
        """
        original = self.plain_class
        self.__dict__.pop('_converted_from', None)
        del self.quantizer
        replace_class(self, wrapped_class(type(self)), original)
        return original

    @classmethod
    def from_float(cls, layer, bits=None, group_size=None):
        """Make a compressed layer with the parameters of a plain one.

        Both share parameters and buffers. Other state, such as training mode
        and hooks, is copied.

        Args:
            layer (nn.Module): A layer of exactly the torch parent's class. It
                is not changed.
            bits (int, optional): Bits a code, whatever the level. Defaults to
                the level's.
            group_size (int, optional): Elements that share a range. Defaults
                to the model's.

        Returns:
            QuantizedLayer: The new layer, of this class.

        Raises:
            TypeError: If ``layer`` is of another class; a subclass may
                compute something else.
            ValueError: If bits or group size are not valid.
        """
        parent = cls.torch_class()
        if type(layer) is not parent:
            raise TypeError(
                f'{cls.__name__}.from_float takes a layer of class '
                f'{parent.__name__} itself, got {type(layer).__name__}'
            )
        quantizer = cls._make_quantizer(bits, group_size)
        twin = twin_of(layer)
        cls.convert_(twin, quantizer)
        return twin

    def to_float(self):
        """Make a plain layer with the parameters of this one.

        The counterpart of :meth:`from_float`; this layer is not changed.

        Returns:
            nn.Module: The new layer, of the class that :meth:`revert_` would
            give this one.
        """
        twin = twin_of(self)
        twin.revert_()
        return twin

    @property
    def plain_class(self):
        """type: Class that :meth:`revert_` restores."""
        return self.__dict__.get('_converted_from') or self.torch_class()

    @classmethod
    def torch_class(cls):
        """The torch class that this one compresses."""
        return next(
            base
            for base in cls.__mro__[1:]
            if not issubclass(base, QuantizedLayer)
            and issubclass(base, nn.Module)
        )

    @property
    def is_coded(self):
        """bool: Whether it keeps rounded codes of values."""
        return self.kind != 'mask'

    @staticmethod
    def why_exact(module):
        """Reason why a layer would keep as much as its torch parent.

        Args:
            module (nn.Module): An instance of this class or its parent.

        Returns:
            str, optional: The reason; None if it keeps less.
        """
        return None

    def compresses(self, *tensors):
        """Whether this call keeps codes for a backward pass.

        Args:
            *tensors (Tensor, optional): Whatever may need a gradient.
        """
        if self.training and self.quantizer.layer_bits is not None:
            self.quantizer.layer_bits.begin_call()
        return (
            not self.quantizer.exact
            and torch.is_grad_enabled()
            # Tracers and counters of operations know torch's own only.
            and not torch.jit.is_tracing()
            and any(t is not None and t.requires_grad for t in tensors)
        )

    def extra_repr(self):
        """As the parent's, with the bits."""
        text = super().extra_repr()
        quantizer = self.quantizer
        layer_bits, bits = quantizer.layer_bits, quantizer.bits
        if layer_bits is not None:
            bits = f'{layer_bits.bits:g} (adaptive)'
        reason = self.why_exact(self)
        if reason is not None:
            ours = f'exact: {reason}'
        else:
            ours = 'exact' if bits is None else f'bits={bits}'
        return f'{text}, {ours}' if text else ours


class CodedLayer(QuantizedLayer):
    """Mixin of the layers that keep their input as codes.

    Args:
        *args: As the torch parent.
        bits (int, optional): Bits an element of the kept input at every level
            but L0. Valid values are 1 to 8. Defaults to the level's.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.
        **kwargs: As the torch parent.
    """

    def __init__(self, *args, bits=None, group_size=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._init_quantizer(bits, group_size)


class ExactLayer(QuantizedLayer):
    """Mixin of the layers that keep less without any rounding.

    At L0 they keep as much as their torch parent, at other levels
    ``kept_bits`` an element.

    Attributes:
        kept_bits (int): Bits an element of the output; 0 for layers whose
            backward pass needs no tensor.
    """

    kind = 'mask'
    shares_bits = False
    kept_bits = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._init_quantizer(None, None)

    @classmethod
    def level_bits(cls, level):
        """See the base class."""
        return cls.kept_bits if level.mask else None

    @classmethod
    def rule_bits(cls, rule):
        """See the base class."""
        return None if rule.bits is None else cls.kept_bits


def is_refused_in_place(layer, input):
    """Whether torch refuses to overwrite the input of an activation.

    Args:
        layer (nn.Module): The activation, which may have no variant in place.
        input (Tensor[*]): Its input.

    Returns:
        bool: True for a leaf that needs a gradient, where it works in place.
    """
    inplace = getattr(layer, 'inplace', False)
    return inplace and input.is_leaf and input.requires_grad


def twin_of(layer):
    """Make a second module that shares parameters, buffers and hooks.

    Args:
        layer (nn.Module): The first module.

    Returns:
        nn.Module: A module of the same class.
    """
    twin = layer.__new__(type(layer))
    # Dicts and sets of parameters, buffers and hooks are copied, their entries
    # are shared.
    twin.__dict__.update(
        {
            key: copy.copy(value) if isinstance(value, (dict, set)) else value
            for key, value in vars(layer).items()
        }
    )
    return twin
