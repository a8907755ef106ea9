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


def wrap_forward(mixin, cls, run):
    """Derive a class with another forward pass that nobody can tell apart.

    Args:
        mixin (type): First base of the class. Its attribute ``plain_class``
            is set to ``cls``.
        cls (type): Class of a module, whose name, signature and documentation
            the new class has.
        run (Callable): The forward pass, called with ``cls``, the module and
            its arguments.

    Returns:
        type: The new class.
    """

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        return run(cls, self, *args, **kwargs)

    # Direct bases are compared by name, see register_layer().
    return type(cls)(
        cls.__name__,
        (mixin, cls, *(b for b in cls.__bases__ if b not in mixin.__mro__)),
        dict(
            forward=forward,
            plain_class=cls,
            __module__=cls.__module__,
            __qualname__=cls.__qualname__,
            __doc__=cls.__doc__,
        ),
    )


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
