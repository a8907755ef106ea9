"""Base class of adapters, which replace classes of other packages."""

import functools

import torch
from torch import nn

from ..functional import call_in_scope
from ..fusion.eligibility import may_fuse
from ..modules.execution import is_ordinary, is_transformed, refuse_script
from ..modules.function_mode import call_outside
from ..modules.functions import fingerprint, functions_of, has_functions


class Adapter:
    """Mixin of subclasses that compute as their parent, with less memory.

    Adapters serve modules that cannot be traced, such as heads over feature
    levels. Functions that they call become layers without parameters, which
    are converted like other layers. An adapter has its parent's parameters
    and ``state_dict`` keys; :meth:`convert_` turns any instance of the parent
    into an adapter, and :meth:`revert_` turns it back. In evaluation, and
    under tracers and observers, the parent's own forward pass runs.

    Attributes:
        uses_chains (bool): Whether the model's level allows layers to run as
            chains.
    """

    uses_chains = True
    # Names of the parent's methods that adapted_forward() replaces.
    replaces = ('forward',)
    # Names of the layers of make_layers() that are ReLUs right behind a
    # convolution.
    coded_relus = ()

    __prepare_scriptable__ = refuse_script

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.plain_class is not None:
            cls._take_over(cls.plain_class)

    @classmethod
    def _take_over(cls, parent):
        """Let :meth:`adapted_forward` take the place of a parent's."""
        cls._functions = functions = {}
        for name in cls.replaces:
            functions.update(functions_of(parent, name))

        @functools.wraps(parent.forward)
        def forward(self, *args, **kwargs):
            run = functools.partial(parent.forward, self)
            if call_outside(self._can_adapt, args, kwargs):
                run = self.adapted_forward
            return call_in_scope(self, run, args, kwargs)

        cls.forward = forward

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, layer in self.make_layers(self).items():
            self.add_module(name, layer)

    @classmethod
    def make_layers(cls, module):
        """Make layers in place of functions that a module calls.

        Args:
            module (nn.Module): An instance of this class or its parent.

        Returns:
            dict[str, QuantizedLayer]: New layers by their names in the
            module; empty if the module calls no function that keeps tensors.
        """
        return {}

    @classmethod
    def is_complete(cls):
        """Whether the class is a valid adapter.

        Returns:
            bool: False without :meth:`adapted_forward`, or if the parent
            lacks a method that is named in ``replaces``.
        """
        return (
            cls.adapted_forward is not Adapter.adapted_forward
            and cls._functions.keys() >= set(cls.replaces)
        )

    @classmethod
    def serves(cls, plain):
        """Whether the adapter computes as a class.

        Args:
            plain (type): The parent, or a subclass of it.

        Returns:
            bool: False if it overrides a function that the adapter replaces.
        """
        return has_functions(plain, cls._functions)

    def adapted_forward(self, *args, **kwargs):
        """Forward pass with the same results as the parent's.

        Args:
            *args: As the parent's.
            **kwargs: As the parent's.
        """
        raise NotImplementedError

    @classmethod
    def convert_(cls, module, layers):
        """Turn an instance of the parent into this class, in place.

        Args:
            module (nn.Module): The module to convert.
            layers (dict[str, nn.Module]): Layers from :meth:`make_layers`, or
                their plain counterparts.
        """
        for name, layer in layers.items():
            module.add_module(name, layer)
        plain = type(module)
        module.__class__ = (
            cls if plain is cls.plain_class else cls.derive(plain)
        )

    @classmethod
    def derive(cls, plain):
        """Derive the adapter of a subclass of the parent.

        Args:
            plain (type): The subclass.

        Returns:
            type: A subclass of both, the same at every call.
        """
        return derive(cls, plain)

    def revert_(self):
        """Turn this module into its parent, in place."""
        for name in self.make_layers(self):
            delattr(self, name)
        for name in ('uses_chains', '_runners'):
            self.__dict__.pop(name, None)
        self.__class__ = type(self).plain_class

    @classmethod
    def matches_source(cls, fingerprints):
        """Whether the adapter was written for the parent's source.

        Args:
            fingerprints (Sequence[str]): Fingerprints of supported sources,
                see :func:`fingerprint`; an empty sequence supports all.
        """
        return not fingerprints or fingerprint(cls._functions) in fingerprints

    def get_runner(self, name, make):
        """Object that runs layers, made at the first call for it.

        It keeps execution plans from call to call. Reverting removes it.

        Args:
            name (object): Key of the object within the module.
            make (Callable): Makes it, without arguments.

        Returns:
            object: The object.
        """
        runners = self.__dict__.setdefault('_runners', {})
        if name not in runners:
            runners[name] = make()
        return runners[name]

    def may_chain(self):
        """Whether layers may run as a chain in this call.

        Returns:
            bool: False if the level has no chains, or where
            :func:`mmactnn.fusion.eligibility.may_fuse` does not hold.
        """
        return self.uses_chains and may_fuse()

    def _can_adapt(self, args, kwargs):
        if (
            not self.training
            or torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or is_transformed()
        ):
            return False
        functions = type(self)._functions
        if functions.keys() & self.__dict__.keys() or not type(self).serves(
            type(self).plain_class
        ):
            return False
        values = [*args, *kwargs.values()]
        return all(
            is_ordinary(x)
            for value in values
            for x in (value if isinstance(value, (list, tuple)) else [value])
        )


def _plain_class(cls):
    for base in cls.__mro__[1:]:
        if issubclass(base, nn.Module) and not issubclass(base, Adapter):
            return base
    return None


class _PlainClass:
    """Class attribute with the class that :meth:`Adapter.revert_` restores."""

    def __get__(self, instance, owner):
        return _plain_class(owner)


Adapter.plain_class = _PlainClass()


class _Derived:
    """Mixin of classes that are derived at run time.

    Attributes:
        made_of (tuple[type]): The adapter and the plain class, for copies and
            pickles.
    """

    made_of = ()

    def __reduce_ex__(self, protocol):
        return _make_instance, self.made_of, self.__getstate__()


def _make_instance(adapter, plain):
    cls = adapter.derive(plain)
    return cls.__new__(cls)


@functools.cache
def derive(adapter, plain, inserted=False):
    """Derive the adapter of a subclass of an adapter's parent.

    Args:
        adapter (type): The adapter.
        plain (type): The subclass, which overrides no function that the
            adapter replaces.
        inserted (bool, optional): Whether methods of the subclass go before
            those of the adapter. Defaults to False.

    Returns:
        type: A subclass of both.
    """
    bases = (plain, adapter) if inserted else (adapter, plain)
    return type(plain)(
        adapter.__name__,
        (_Derived, *bases),
        dict(made_of=(adapter, plain), __module__=plain.__module__),
    )
