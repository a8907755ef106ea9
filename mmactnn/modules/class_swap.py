"""Exchange of a module's class in place."""

import functools
import sys


def wrapped_class(cls):
    """Class before torch derived another one from it.

    Args:
        cls (type): Class of a module: with parametrised tensors or shards of
            ``fully_shard`` made on the fly, or any other.

    Returns:
        type: The original class; ``cls`` itself if torch derived none.
    """
    # Importing it takes a second. Without it no class is derived from it.
    fsdp = sys.modules.get('torch.distributed.fsdp')
    shard = getattr(fsdp, 'FSDPModule', None)
    while True:
        if shard in cls.__bases__:
            cls = next(b for b in cls.__bases__ if b is not shard)
        elif _is_parametrized(cls):
            (cls,) = cls.__bases__
        else:
            return cls


def _is_parametrized(cls):
    return (
        len(cls.__bases__) == 1
        and cls.__name__.startswith('Parametrized')
        and any(isinstance(value, property) for value in vars(cls).values())
    )


class Derived:
    """Mixin of classes that are derived from two others at run time.

    Attributes:
        made_of (tuple[type]): The classes, for copies and pickles.
    """

    made_of = ()

    def __reduce_ex__(self, protocol):
        return _make_instance, self.made_of, self.__getstate__()


@functools.cache
def derive(first, plain):
    """Derive a class that computes as one class and subclasses another.

    Args:
        first (type): Class whose methods go first.
        plain (type): Class of a module, subclass of the parent of ``first``.

    Returns:
        type: A subclass of both, always the same for the same arguments.
    """
    bases = (Derived, first, plain)
    # Direct bases, too, are compared by name: see register_layer().
    bases += tuple(b for b in plain.__bases__ if b not in bases)
    return type(plain)(
        f'{first.__name__}[{plain.__name__}]',
        bases,
        dict(made_of=(first, plain), __module__=plain.__module__),
    )


def _make_instance(first, plain):
    cls = derive(first, plain)
    return cls.__new__(cls)


class WithForward:
    """Base of mixins for classes with another forward pass.

    Such a class has the name and the signature of its parent, so that checks
    by name go on to work. Subclasses are mixins; :meth:`of` makes the class.

    Attributes:
        plain_class (type): The parent.
    """

    plain_class = None
    _mixin = None

    @staticmethod
    def run_forward(cls, module, *args, **kwargs):
        """Forward pass in place of the parent's.

        Args:
            cls (type): The parent.
            module (nn.Module): The module.
            *args (object): Arguments of its forward pass.
            **kwargs (object): Keyword arguments of its forward pass.

        Returns:
            object: Its result.
        """
        raise NotImplementedError

    @classmethod
    def of(cls, plain):
        """The class with this mixin for a plain class.

        Args:
            plain (type): Class of a module.

        Returns:
            type: A subclass of it, the same at every call.
        """
        return _with_forward(cls, plain)

    def __reduce_ex__(self, protocol):
        arguments = self._mixin, self.plain_class
        return _make_with_forward, arguments, self.__getstate__()


@functools.cache
def _with_forward(mixin, plain):
    @functools.wraps(plain.forward)
    def forward(self, *args, **kwargs):
        return mixin.run_forward(plain, self, *args, **kwargs)

    # Direct bases are compared by name, see register_layer().
    return type(plain)(
        plain.__name__,
        (
            mixin,
            plain,
            *(b for b in plain.__bases__ if b not in mixin.__mro__),
        ),
        dict(
            forward=forward,
            plain_class=plain,
            _mixin=mixin,
            __module__=plain.__module__,
            __qualname__=plain.__qualname__,
            __doc__=plain.__doc__,
        ),
    )


def _make_with_forward(mixin, plain):
    cls = mixin.of(plain)
    return cls.__new__(cls)


def replace_class(module, old, new):
    """Replace the class of a module, or one of its bases.

    Classes that torch has made on the fly around the old one (parametrised
    layers, shards of FSDP) are made again around the new one.

    Args:
        module (nn.Module): The module.
        old (type): Its class, or a base of it.
        new (type): Replacement of ``old``.
    """
    module.__class__ = _rebuilt(type(module), old, new)


def _rebuilt(cls, old, new):
    if cls is old:
        return new
    if old not in cls.__mro__:
        return cls
    namespace = {
        key: value
        for key, value in vars(cls).items()
        if key not in ('__dict__', '__weakref__')
    }
    bases = tuple(_rebuilt(base, old, new) for base in cls.__bases__)
    return type(cls)(cls.__name__, bases, namespace)
