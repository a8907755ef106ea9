"""Adapters: classes that take the place of another package's."""

import ast
import functools
import hashlib
import inspect
import textwrap

import torch
from torch import nn

from ..fusion.eligibility import may_fuse
from ..modules.execution import is_ordinary, is_transformed
from ..modules.functions import find_static, functions_of


class Adapter:
    """Mixin of classes that compute as their parent, with less memory.

    For what no trace can show: heads over feature levels, and functions that
    become layers without parameters, so that conversion treats them as any
    other. An adapter has its parent's parameters and ``state_dict`` keys; any
    instance of the parent becomes one by :meth:`convert_`, and the parent
    again by :meth:`revert_`. In evaluation, and where something reads along,
    the parent's own forward pass runs.

    Attributes:
        uses_chains (bool): Whether layers may run together, at the level that
            the model has.
    """

    uses_chains = True
    # Methods of the parent that adapted_forward() stands for.
    replaces = ('forward',)
    # Names of layers of make_layers(): ReLUs right behind a convolution.
    coded_relus = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        parent = cls.plain_class
        if parent is None:
            return
        cls._functions = functions = {}
        for name in cls.replaces:
            functions.update(functions_of(parent, name))

        @functools.wraps(parent.forward)
        def forward(self, *args, **kwargs):
            if self._can_adapt(args, kwargs):
                return self.adapted_forward(*args, **kwargs)
            return parent.forward(self, *args, **kwargs)

        cls.forward = forward

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, layer in self.make_layers(self).items():
            self.add_module(name, layer)

    @classmethod
    def make_layers(cls, module):
        """The layers that stand for functions that a module calls.

        Args:
            module (nn.Module): An instance of this class or its parent.

        Returns:
            dict[str, QuantizedLayer]: New layers by their names in the
            module; none if it calls no function that keeps anything.
        """
        return {}

    @classmethod
    def is_complete(cls):
        """Whether the class defines what an adapter has to.

        Returns:
            bool: False without :meth:`adapted_forward`, or if the parent has
            no method of a name in ``replaces``.
        """
        return (
            cls.adapted_forward is not Adapter.adapted_forward
            and cls._functions.keys() >= set(cls.replaces)
        )

    @classmethod
    def fits(cls, module):
        """Whether an instance of the parent gains by the adapter.

        Args:
            module (nn.Module): The instance.
        """
        return True

    def adapted_forward(self, *args, **kwargs):
        """See the parent's forward pass, which this one is equal to."""
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
        plain = type(module)
        target = cls if plain is cls.plain_class else derive(cls, plain)
        module.__class__ = target

    def revert_(self):
        """Turn this module into its parent, in place."""
        for name in self.make_layers(self):
            delattr(self, name)
        self.__dict__.pop('uses_chains', None)
        self.__class__ = type(self).plain_class

    @classmethod
    def matches_source(cls, fingerprints):
        """Whether the parent is the one that the adapter was written for.

        Args:
            fingerprints (Sequence[str]): Those of the sources that it knows;
                see :func:`fingerprint`. None at all match every parent.
        """
        return not fingerprints or fingerprint(cls._functions) in fingerprints

    def may_chain(self):
        """bool: Whether layers may run together, in this call."""
        return self.uses_chains and may_fuse()

    def _can_adapt(self, args, kwargs):
        if (
            not self.training
            or torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or is_transformed()
        ):
            return False
        cls, own = type(self), self.__dict__
        plain = cls.plain_class
        if any(
            name in own or find_static(plain, name) is not value
            for name, value in cls._functions.items()
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
    """Class attribute: what :meth:`Adapter.revert_` makes of a module."""

    def __get__(self, instance, owner):
        return _plain_class(owner)


Adapter.plain_class = _PlainClass()


@functools.cache
def derive(adapter, plain):
    """An adapter of a subclass of its parent.

    Args:
        adapter (type): The adapter.
        plain (type): The subclass, which leaves the functions alone that the
            adapter stands for.

    Returns:
        type: A subclass of both.
    """
    return type(plain)(adapter.__name__, (adapter, plain), {})


# Fields of a syntax tree that compute nothing, or that some versions of Python
# lack.
_NO_CODE = (
    'annotation',
    'ctx',
    'decorator_list',
    'kind',
    'returns',
    'type_comment',
    'type_ignores',
    'type_params',
)


def fingerprint(functions):
    """Hash of the sources of functions, without comments and layout.

    It is the same under all versions of Python.

    Args:
        functions (dict[str, object]): The functions by name.

    Returns:
        str: 16 hexadecimal digits; empty if there is no source.
    """
    texts = []
    for name in sorted(functions):
        value = functions[name]
        function = getattr(value, 'fget', None) or value
        try:
            source = textwrap.dedent(inspect.getsource(function))
            tree = ast.parse(source)
        except (OSError, TypeError, SyntaxError):
            return ''
        texts.append(f'{name}: {_structure(tree)}')
    return hashlib.sha256('\n'.join(texts).encode()).hexdigest()[:16]


def _structure(node):
    """Text of a syntax tree, without docstrings and annotations."""
    if isinstance(node, list):
        return f'[{", ".join(map(_structure, node))}]'
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
        fields['body'] = node.body[1:]
    texts = [
        f'{name}={_structure(value)}'
        for name, value in fields.items()
        if name not in _NO_CODE and value not in (None, [])
    ]
    return f'{type(node).__name__}({", ".join(texts)})'
