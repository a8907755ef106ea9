"""Functions of a class's forward pass, compared by identity."""

import ast
import functools
import hashlib
import inspect
import textwrap
from types import CodeType, FunctionType

from torch import nn

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


def names_in(code):
    """Names that a function's code reads: attributes, globals and strings.

    Strings are included since ``getattr(self, 'norm1')`` reads that attribute.

    Args:
        code (types.CodeType): Code of a function; functions within it count.

    Returns:
        set[str]: The names.
    """
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str):
            names.add(constant)
        elif isinstance(constant, CodeType):
            names |= names_in(constant)
    return names


def find_static(cls, name):
    """A class's attribute as it was defined: descriptors are not called.

    As ``inspect.getattr_static``, which takes a hundred times as long.

    Args:
        cls (type): The class.
        name (str): Name of the attribute.

    Returns:
        object: None if the class has none.
    """
    for base in cls.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return None


def functions_of(cls, name='forward'):
    """A method of a class and all methods of the class that it calls.

    Those of ``nn.Module`` itself do not count: they serve every module.

    Args:
        cls (type): Subclass of ``nn.Module``.
        name (str, optional): Name of the method. Defaults to ``'forward'``.

    Returns:
        dict[str, object]: Attributes of the class by the names of the
        methods: functions, properties and the like.
    """
    found, todo = {}, [name]
    while todo:
        name = todo.pop()
        if name in found or hasattr(nn.Module, name) and name != 'forward':
            continue
        value = find_static(cls, name)
        function = _function_of(value)
        if function is None:
            continue
        found[name] = value
        todo += names_in(function.__code__)
    return found


def _function_of(value):
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, '__func__', value)
    return value if isinstance(value, FunctionType) else None


def codes_of(functions):
    """Code of functions, as running frames name it.

    Args:
        functions (dict[str, object]): See :func:`functions_of`.

    Returns:
        set[types.CodeType]: The code.
    """
    found = map(_function_of, functions.values())
    return {function.__code__ for function in found if function is not None}


def has_functions(cls, functions):
    """Whether a class has given functions, its own or inherited.

    Args:
        cls (type): The class.
        functions (dict[str, object]): See :func:`functions_of`.
    """
    return all(
        find_static(cls, name) is value for name, value in functions.items()
    )


def computes_as(module, functions):
    """Whether a module's forward pass is made of given functions.

    Args:
        module (nn.Module): The module.
        functions (dict[str, object]): See :func:`functions_of`.

    Returns:
        bool: False if its class overrides one of them, or the instance does.
    """
    replaced = functions.keys() & module.__dict__.keys()
    return not replaced and has_functions(type(module), functions)


def fingerprint(functions):
    """Hash of the sources of functions, without comments and layout.

    It is the same under all versions of Python.

    Args:
        functions (dict[str, object]): The functions by name.

    Returns:
        str: 16 hexadecimal digits; empty if there is no source.
    """
    return _fingerprint(tuple(sorted(functions.items())))


# Sources are read from files, and each layer of a model asks.
@functools.lru_cache(maxsize=256)
def _fingerprint(functions):
    texts = []
    for name, value in functions:
        function = getattr(value, 'fget', None) or value
        try:
            source = textwrap.dedent(inspect.getsource(function))
            tree = ast.parse(source)
        except (OSError, TypeError, SyntaxError):
            return ''
        texts.append(f'{name}: {_structure(tree)}')
    return hashlib.sha256('\n'.join(texts).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def reads_first_only(cls, name):
    """Whether a forward pass reads the first result of a part, and no other.

    It does if its functions mention the part as ``self.part(...)[0]`` alone.

    Args:
        cls (type): Class of the module.
        name (str): Name of the part in the module.

    Returns:
        bool: False also where there is no source.
    """
    mentions = firsts = 0
    for value in functions_of(cls).values():
        try:
            source = textwrap.dedent(inspect.getsource(_function_of(value)))
            tree = ast.parse(source)
        except (OSError, TypeError, SyntaxError):
            return False
        for node in ast.walk(tree):
            mentions += isinstance(node, ast.Attribute) and node.attr == name
            mentions += isinstance(node, ast.Constant) and node.value == name
            firsts += (
                isinstance(node, ast.Subscript)
                and isinstance(node.slice, ast.Constant)
                and node.slice.value == 0
                and isinstance(node.value, ast.Call)
                and isinstance(node.value.func, ast.Attribute)
                and node.value.func.attr == name
                and isinstance(node.value.func.value, ast.Name)
            )
    return mentions == firsts > 0


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
