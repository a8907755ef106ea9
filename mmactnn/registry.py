"""Registry of compressed layers, fused patterns and adapters.

Conversions, names for configs, exports, the reasons of the report and the
documentation's table of layers are derived from this registry.

MMEngine imports this module for types of the scope ``mmactnn``. The package's
MMEngine registries are lazy attributes, so that importing this module does
not import MMEngine.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from .modules.functions import (
    codes_of,
    computes_as,
    fingerprint,
    functions_of,
    has_functions,
)


class LayerEntry(NamedTuple):
    """A compressed layer type and the plain layer that it stands for.

    Attributes:
        layer (type): Compressed class.
        parent (type): Class whose instances it replaces.
        names (tuple[str]): Names in configs.
        aliases (dict[str, tuple[str]]): Full names of further classes that
            compute as the parent does, and the known sources of the
            functions that they override.
        saved_by_torch (Callable): Rule for the tensors that the parent saves
            for its backward pass, see :func:`register_layer`.
        functions (dict[str, object]): Functions of the parent's forward pass
            when it was registered.
        examples (Callable, optional): See :func:`register_layer`.
    """

    layer: type
    parent: type
    names: tuple
    aliases: tuple
    saved_by_torch: Callable
    functions: dict
    examples: Callable | None


class PatternEntry(NamedTuple):
    """A pattern over the traces of blocks.

    Attributes:
        match (Callable): Maps a block to sites.
        layers (tuple[type]): Classes of compressed layers, one of which a
            block must have to be traced; an empty tuple stands for any.
    """

    match: Callable
    layers: tuple


class AdapterEntry(NamedTuple):
    """An adapter and the class that it stands for.

    Attributes:
        adapter (type): Subclass of :class:`mmactnn.adapters.Adapter`.
        target (type): Class whose instances it adapts.
        names (tuple[str]): Names in configs.
        fingerprints (tuple[str]): Known sources of the target.
    """

    adapter: type
    target: type
    names: tuple
    fingerprints: tuple


class FunctionEntry(NamedTuple):
    """A function of torch that is called as a compressed layer.

    Attributes:
        name (str): Name, as that of a layer within the calling module.
        layer (type): Compressed layer that computes the same.
        compress (Callable): See :func:`register_function`.
        takes (Callable, optional): See there.
        without_grad (bool): See there.
        needs_parameters (bool): See there.
    """

    name: str
    layer: type
    compress: Callable
    takes: Callable | None
    without_grad: bool
    needs_parameters: bool

    def __call__(self, scope, function, args, kwargs):
        """Handle a call, see :class:`.modules.function_mode.FunctionMode`."""
        if self.takes is not None and not self.takes(*args, **kwargs):
            return NotImplemented
        return scope.compress(self, args, kwargs)


class ConfigNames:
    """Base of what takes the names of registered classes for configs."""

    def holder(self, name):
        """Class of somebody else that a name stands for in configs.

        Args:
            name (str): The name.

        Returns:
            object, optional: None if the name is free.
        """
        raise NotImplementedError

    def add(self, names, cls):
        """Let configs name a class.

        Args:
            names (Sequence[str]): Its names, all of them free.
            cls (type): The class.
        """
        raise NotImplementedError

    def add_lazily(self, name, path):
        """Let configs name a class that is imported when it is built.

        Args:
            name (str): Its name.
            path (str): ``'module:class'``.
        """
        raise NotImplementedError


class Registry:
    """Registered layers, patterns and adapters.

    :func:`register_layer` and its siblings use the package's one; tests make
    their own.
    """

    def __init__(self):
        self.layers = {}
        self.patterns = {}
        self.adapters = {}
        # Handlers of calls of torch's functions, see FunctionMode.
        self.functions = {}
        # Code of forward passes that layers stand for.
        self.codes = set()
        self._providers = {}
        self._provided = {}
        self._subscribers = []
        self._by_parent = {}
        self._by_alias = {}

    def add_layer(
        self, layer, parent, names, aliases, saved_by_torch, examples
    ):
        """See :func:`register_layer`."""
        _check_layer(layer, parent)
        if not callable(saved_by_torch):
            raise TypeError(
                f'{layer.__name__} is registered without a rule for what '
                f'{parent.__name__} keeps: saved_by_torch must be a function '
                f'of the call, got {saved_by_torch!r}'
            )
        if not isinstance(aliases, dict):
            raise TypeError(
                f'aliases of {layer.__name__} must be a dict from full names '
                f'of classes to fingerprints of their sources, got {aliases!r}'
            )
        names = (layer.__name__, *names)
        taken = self._taken(layer, parent, names, aliases)
        if taken:
            raise ValueError(f'{layer.__name__} cannot be registered: {taken}')
        _add_direct_bases(layer, parent)
        entry = LayerEntry(
            layer,
            parent,
            names,
            {alias: tuple(known) for alias, known in aliases.items()},
            saved_by_torch,
            functions_of(parent),
            examples,
        )
        self.layers[layer] = self._by_parent[parent] = entry
        self.codes.update(codes_of(entry.functions))
        self._by_alias.update(dict.fromkeys(entry.aliases, entry))
        for subscriber in self._subscribers:
            subscriber.add(names, layer)

    @property
    def config_names(self):
        """set[str]: Names of all layers and adapters in configs."""
        entries = (*self.layers.values(), *self.adapters.values())
        names = {name for entry in entries for name in entry.names}
        return names | self._provided.keys()

    def subscribe(self, subscriber):
        """Add names of all layers and adapters, registered now or later.

        Args:
            subscriber (ConfigNames): Takes the names.

        Returns:
            list[str]: Messages about names that others have; the classes
            keep the rest of theirs.
        """
        clashes = []

        def is_free(name):
            holder = subscriber.holder(name)
            if holder is not None:
                clashes.append(f'the name {name!r} is that of {holder!r}')
            return holder is None

        for name, path in self._provided.items():
            if is_free(name):
                subscriber.add_lazily(name, path)
        for entry in (*self.layers.values(), *self.adapters.values()):
            subscriber.add(tuple(filter(is_free, entry.names)), entry[0])
        self._subscribers.append(subscriber)
        return clashes

    def _taken(self, layer, parent, names, aliases):
        if layer in self.layers:
            return 'it is registered already'
        if parent in self._by_parent:
            other = self._by_parent[parent].layer.__name__
            return f'{parent.__name__} has {other} already'
        for alias in aliases:
            if alias in self._by_alias:
                other = self._by_alias[alias].layer.__name__
                return f'{alias} has {other} already'
        return self._holder_of(names)

    def _holder_of(self, names):
        entries = (*self.layers.values(), *self.adapters.values())
        used = {n: entry[0].__name__ for entry in entries for n in entry.names}
        for name in names:
            if name in used:
                return f'the name {name!r} is that of {used[name]}'
            for subscriber in self._subscribers:
                holder = subscriber.holder(name)
                if holder is not None:
                    return f'configs have the name {name!r} for {holder!r}'
        return None

    def add_pattern(self, match, name, layers):
        """See :func:`register_pattern`."""
        if not isinstance(name, str):
            raise TypeError(f'a pattern must have a name, got {name!r}')
        _check_parameters(match, 1, 'a pattern', 'the trace of a block')
        layers = tuple(layers)
        for layer in layers:
            if not isinstance(layer, type):
                raise TypeError(
                    f'layers of the pattern {name!r} must be classes, got '
                    f'{layer!r}'
                )
        if name in self.patterns:
            raise ValueError(f'a pattern {name!r} is registered already')
        self.patterns[name] = PatternEntry(match, layers)

    def add_adapter(self, adapter, target, names, fingerprints):
        """See :func:`register_adapter`."""
        if not (isinstance(target, type) and issubclass(target, nn.Module)):
            raise TypeError(
                f'target must be a subclass of nn.Module, got {target!r}'
            )
        if getattr(adapter, 'plain_class', None) is not target:
            raise TypeError(
                f'{getattr(adapter, "__name__", adapter)} must be a subclass '
                f'of Adapter and, directly, of {target.__name__}, which it '
                'stands for'
            )
        if not adapter.is_complete():
            raise TypeError(
                f'{adapter.__name__} must define adapted_forward(), and '
                f'{target.__name__} the methods {adapter.replaces} that it '
                'stands for'
            )
        if target in self.adapters:
            other = self.adapters[target].adapter.__name__
            raise ValueError(
                f'{target.__name__} has the adapter {other} already'
            )
        names = (adapter.__name__, *names)
        taken = self._holder_of(names)
        if taken:
            raise ValueError(
                f'{adapter.__name__} cannot be registered: {taken}'
            )
        self.adapters[target] = AdapterEntry(
            adapter, target, names, tuple(fingerprints)
        )
        for subscriber in self._subscribers:
            subscriber.add(names, adapter)

    def add_function(
        self, functions, layer, compress, takes, without_grad, needs_parameters
    ):
        """See :func:`register_function`."""
        if layer not in self.layers:
            raise TypeError(
                'layer must be a registered class of compressed layers, got '
                f'{layer!r}'
            )
        if not callable(compress):
            raise TypeError(
                f'a compressed function must be a function, got {compress!r}'
            )
        if any(
            isinstance(other, FunctionEntry)
            and other.name == compress.__name__
            for other in self.functions.values()
        ):
            raise ValueError(
                f'a compressed function {compress.__name__!r} is registered '
                'already'
            )
        entry = FunctionEntry(
            compress.__name__,
            layer,
            compress,
            takes,
            without_grad,
            needs_parameters,
        )
        self.add_handler(functions, entry)

    def add_handler(self, functions, handle):
        """Let a handler be called in place of functions.

        Args:
            functions (Sequence[Callable]): Functions of torch, and methods of
                ``torch.Tensor``.
            handle (Callable): See
                :class:`mmactnn.modules.function_mode.FunctionMode`.

        Raises:
            TypeError: If one of them is no function.
            ValueError: If one of them has a handler already.
        """
        if not functions:
            raise TypeError('no function to handle is given')
        for function in functions:
            if not callable(function):
                raise TypeError(
                    f'functions of torch must be callable, got {function!r}'
                )
            if function in self.functions:
                raise ValueError(f'{function!r} has a handler already')
        self.functions.update(dict.fromkeys(functions, handle))

    def find_adapter(self, cls):
        """Find the adapter of a class, or of one that it computes as.

        Args:
            cls (type): Class of a module.

        Returns:
            AdapterEntry, optional: None if there is none.
        """
        self._load_providers(cls)
        for base in cls.__mro__:
            if base in self.adapters:
                entry = self.adapters[base]
                return entry if entry.adapter.serves(cls) else None
        return None

    def add_provider(self, package, module, names=()):
        """Import a module as soon as a model has a class of a package.

        Args:
            package (str): Import name of the package, or full name of one
                module of it.
            module (str): Name of the module, which registers adapters and
                patterns for classes of the package.
            names (Sequence[str], optional): Classes of the module that
                configs can name before it is imported.
        """
        self._providers[package] = module
        for name in names:
            self._provided[name] = path = f'{module}:{name}'
            for subscriber in self._subscribers:
                subscriber.add_lazily(name, path)

    def _load_providers(self, cls):
        for base in cls.__mro__:
            package = base.__module__.partition('.')[0]
            for home in dict.fromkeys((package, base.__module__)):
                module = self._providers.pop(home, None)
                if module is not None:
                    importlib.import_module(module)

    def entry_of(self, cls):
        """The entry of a compressed class, or of one derived from it.

        Args:
            cls (type): The class.

        Returns:
            LayerEntry, optional: None if there is none.
        """
        for base in cls.__mro__:
            if base in self.layers:
                return self.layers[base]
        return None

    def find_layer(self, module):
        """Find the entry for converting a plain module.

        A class is known by the functions of its forward pass, not by its
        name: a subclass that overrides none of them is treated as its parent.

        Args:
            module (nn.Module): The module.

        Returns:
            tuple[LayerEntry | None, str | None]: The entry, or None and the
            reason.
        """
        cls = type(module)
        self._load_providers(cls)
        entry = self.entry_of(cls)
        if entry is not None:
            return entry, None
        entry = self._by_alias.get(f'{cls.__module__}.{cls.__qualname__}')
        if entry is not None:
            return _check_alias(entry, module)
        entry = next(
            (
                self._by_parent[base]
                for base in cls.__mro__
                if base in self._by_parent
            ),
            None,
        )
        if entry is None:
            return None, 'no compressed layer of this type'
        if isinstance(module, LazyModuleMixin):
            return None, (
                'lazy: its size is not known yet; run it once before the '
                'conversion'
            )
        if computes_as(module, entry.functions):
            return entry, None
        name = next(
            (name for name in entry.functions if name in vars(module)), None
        )
        if name is not None:
            return None, f'its {name} was replaced on the instance'
        return None, (
            f'subclass of {entry.parent.__name__}, computes otherwise'
        )


def _check_alias(entry, module):
    """See :meth:`Registry.find_layer`."""
    cls = type(module)
    if 'forward' in vars(module):
        return None, 'its forward was replaced on the instance'
    own = {
        name: value
        for name, value in functions_of(cls).items()
        if value is not entry.functions.get(name)
    }
    inherited = {
        name: value
        for name, value in entry.functions.items()
        if name not in own
    }
    derives = issubclass(cls, entry.parent)
    known = not derives or has_functions(cls, inherited)
    name = f'{cls.__module__}.{cls.__qualname__}'
    if known and (not own or fingerprint(own) in entry.aliases[name]):
        return entry, None
    return None, (
        f'its forward pass is not the one that {entry.layer.__name__} was '
        'written for'
    )


def _check_layer(layer, parent):
    for argument, value in (('layer', layer), ('parent', parent)):
        if not (isinstance(value, type) and issubclass(value, nn.Module)):
            raise TypeError(
                f'{argument} must be a subclass of nn.Module, got {value!r}'
            )
    if not issubclass(layer, parent):
        raise TypeError(
            f'{layer.__name__} must be a subclass of {parent.__name__}, the '
            'class whose instances it replaces'
        )
    _check_mixin(layer, parent)


def _check_mixin(layer, parent):
    # By attributes, since the module of the mixin imports this one.
    torch_class = getattr(layer, 'torch_class', None)
    if torch_class is None:
        raise TypeError(
            f'{layer.__name__} must have the mixin QuantizedLayer, or one '
            'derived from it, before its parent'
        )
    if torch_class() is not parent:
        raise TypeError(
            f'{layer.__name__} stands for {torch_class().__name__}, the next '
            f'of its bases that is plain, not for {parent.__name__}'
        )
    if layer.kind is None:
        raise TypeError(
            f'{layer.__name__} must say by the attribute kind what levels '
            'call it'
        )


def _check_parameters(function, count, kind, takes):
    if not callable(function):
        raise TypeError(f'{kind} must be a function, got {function!r}')
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError as error:
        raise TypeError(
            f'{kind} must take {takes} ({error}), got {function!r}'
        ) from None


def _add_direct_bases(layer, parent):
    """Make the bases of the parent direct ones of the layer.

    MMEngine's ``init_cfg=dict(layer='_ConvNd')`` compares the names of a
    class and of its direct bases, and looks no further.
    """
    missing = [b for b in parent.__bases__ if b not in layer.__bases__]
    layer.__bases__ = (*layer.__bases__, *missing)


default_registry = Registry()
for _package, _module, _names in (
    ('mmcv', 'mmcv', ['QHSigmoid', 'QSwish']),
    # Not in MMCV without compiled ops.
    ('mmcv.ops.multi_scale_deform_attn', 'deformable', []),
    ('mmdet', 'mmdet', ['QFPN', 'QRPNHead', 'QRetinaHead']),
    ('mmseg', 'mmseg', []),
):
    default_registry.add_provider(
        _package, f'mmactnn.adapters.{_module}', _names
    )


def is_alias(layer, plain):
    """Whether a class computes as the parent of a layer by declaration.

    Args:
        layer (type): Compressed class.
        plain (type): A class that it is converted from.
    """
    entry = default_registry.entry_of(layer)
    name = f'{plain.__module__}.{plain.__qualname__}'
    return entry is not None and name in entry.aliases


def register_layer(
    parent, *, saved_by_torch, names=(), aliases=None, examples=None
):
    """Class decorator: let a compressed layer replace a plain one.

    Args:
        parent (type): Class whose instances are converted; a base of the
            decorated class. Its subclasses are converted, too, as long as
            they leave the functions of its forward pass alone.
        saved_by_torch (Callable): Rule for the tensors that the parent would
            save for its backward pass: maps a
            :class:`mmactnn.codes.calls.Call` to a tuple of tensors; None
            stands for a tensor that a call does not need. The layer reports
            its calls by ``quantizer.record``, and only while
            :func:`mmactnn.measure_activations` counts. Parameters among the
            tensors are not counted.
        names (Sequence[str], optional): Names in configs besides that of the
            class.
        aliases (dict[str, Sequence[str]], optional): Full names of classes
            of other packages that compute as the parent does, and
            fingerprints of the functions that they override, see
            :func:`mmactnn.modules.functions.fingerprint`. The packages are
            not imported.
        examples (Callable, optional): Returns examples for generic tests:
            a dict from names to pairs of a function that makes a layer of
            this class and the shape of an input, samples first. The layer
            takes that input alone and is made in training mode.

    Returns:
        Callable: The decorator; it returns the class.

    Raises:
        TypeError: If the class is no :class:`mmactnn.QuantizedLayer` of the
            parent, or ``saved_by_torch`` is missing.
        ValueError: If class, parent, alias or name is registered already.
    """

    def decorate(layer):
        default_registry.add_layer(
            layer, parent, names, aliases or {}, saved_by_torch, examples
        )
        return layer

    return decorate


def register_pattern(name, *, layers=()):
    """Function decorator: run the sites fused that a function finds in blocks.

    Args:
        name (str): Name of the pattern.
        layers (Sequence[type], optional): Classes of compressed layers, or
            mixins of them, one of which a block must have. Blocks without any
            layer that a pattern asks for are not traced. Defaults to any
            compressed layer.

    Returns:
        Callable: The decorator; it returns the function, which maps a
        :class:`mmactnn.fusion.patterns.Block` to the matching sites, objects
        of subclasses of :class:`mmactnn.fusion.sites.Site`. Where sites
        overlap, those of the pattern that was registered last win.

    Raises:
        TypeError: If the function does not take one argument, or ``layers``
            are not classes.
        ValueError: If there is a pattern of that name.
    """

    def decorate(match):
        default_registry.add_pattern(match, name, layers)
        return match

    return decorate


def register_adapter(target, *, names=(), fingerprints=()):
    """Class decorator: let an adapter take the place of a class.

    Args:
        target (type): Class whose instances are adapted, the parent of the
            adapter. Its subclasses are adapted, too, unless they override a
            function that the adapter replaces.
        names (Sequence[str], optional): Names in configs besides that of the
            class.
        fingerprints (Sequence[str], optional): Hashes of the sources that
            the adapter was written for, see
            :func:`mmactnn.modules.functions.fingerprint`; with any other
            source nothing is adapted, and the report says so. Defaults to
            none, which trusts every version.

    Returns:
        Callable: The decorator; it returns the class.

    Raises:
        TypeError: If the class is no :class:`mmactnn.adapters.Adapter` of
            the target.
        ValueError: If the target has an adapter already, or configs have a
            name for something else.
    """

    def decorate(adapter):
        default_registry.add_adapter(adapter, target, names, fingerprints)
        return adapter

    return decorate


def register_function(
    *functions, layer, takes=None, without_grad=False, needs_parameters=False
):
    """Function decorator: compress calls of functions of torch.

    Modules of a converted model call the decorated function in place of
    torch's, in training, with the bits that a layer would have: one of the
    class ``layer`` within the module, under the name of the decorated
    function. It is not called for torch's own layers, which are converted or
    left by themselves.

    Args:
        *functions (Callable): Functions of torch, and methods of
            ``torch.Tensor``, that take the same arguments.
        layer (type): Class of compressed layers that computes the same, and
            is registered: it tells the bits, and the tensors that torch would
            keep.
        takes (Callable, optional): Function of the arguments that tells
            quickly whether a call can be compressed at all. Defaults to yes.
        without_grad (bool, optional): Whether calls without gradients are
            compressed, too. Defaults to False.
        needs_parameters (bool, optional): Whether only modules that have
            parameters, their own or those of their parts, compress it.
            Losses have none. Defaults to False.

    Returns:
        Callable: The decorator; it returns the function. That takes a
        :class:`mmactnn.codes.quantizer.LayerQuantizer` and the arguments of
        the call, and returns its result, or ``NotImplemented`` to leave a
        call to torch. The first argument that is no string is an ordinary
        tensor, and one of the arguments needs a gradient.

    Raises:
        TypeError: If ``layer`` is not registered, or a function is none.
        ValueError: If a function has a handler already, or there is another
            compressed function of that name.
    """

    def decorate(compress):
        default_registry.add_function(
            functions, layer, compress, takes, without_grad, needs_parameters
        )
        return compress

    return decorate


def __getattr__(name):
    if name in ('MODELS', 'HOOKS'):
        from .mmlab import registry

        return getattr(registry, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
