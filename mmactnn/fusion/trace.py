"""Block-local traces: the calls of one module's forward pass as a graph."""

import contextlib
import dataclasses
import dis
import functools
import inspect
import itertools
import operator
import sys
from typing import NamedTuple

import torch
from torch import fx

from ..modules.functions import functions_of
from .guards import Guards, freeze, make_guards

# Modules of torch whose functions access modules and compute nothing.
_MODULE_ACCESS = (
    'torch.fx',
    'torch.nn.modules.module',
    'torch.nn.modules.container',
    'torch._jit_internal',
    'torch.utils._pytree',
    'torch.overrides',
)
# Modules of torch whose functions take tensors, hence proxies. The others
# change the way that functions run: checkpointing, autocast, grad modes.
_TENSOR_FUNCTIONS = (
    'torch',
    'torch.functional',
    'torch.nn.functional',
    'torch.special',
    'torch._tensor',
    'torch._ops',
)
_PURE_BUILTINS = frozenset(
    map(
        id,
        (
            len,
            isinstance,
            issubclass,
            getattr,
            hasattr,
            callable,
            min,
            max,
            abs,
            round,
            sum,
            sorted,
            any,
            all,
            iter,
        ),
    )
)
_MUTATING = frozenset(
    (
        'append',
        'extend',
        'insert',
        'pop',
        'popitem',
        'remove',
        'clear',
        'update',
        'setdefault',
        'add',
        'discard',
        'sort',
        'reverse',
        '__setitem__',
        '__delitem__',
    )
)
_CONTAINERS = (list, dict, set, tuple, frozenset)
_VALUES = (str, bytes, int, float, complex, bool, range, slice, torch.Size)
_STORE_OPCODES = frozenset(
    dis.opmap[name]
    for name in ('STORE_ATTR', 'DELETE_ATTR', 'STORE_GLOBAL', 'DELETE_GLOBAL')
)
_IN_PLACE = {
    f'__{name}__': getattr(operator, name)
    for name in (
        'iadd',
        'isub',
        'imul',
        'itruediv',
        'ifloordiv',
        'imod',
        'ipow',
        'imatmul',
        'iand',
        'ior',
        'ixor',
    )
}
# Most optional tensors of which all subsets are traced.
_MAX_OPTIONAL = 2


class UntraceableError(Exception):
    """Error of a forward pass that cannot be traced, with the reason."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Calls of a module's forward pass.

    Attributes:
        nodes (tuple[fx.Node]): Placeholders of the tensors, calls in their
            order, and the output. The target of a call of a module is the
            qualified name within the traced one.
        arguments (tuple[str]): Names of all arguments, in their order.
        defaults (dict[str, object]): Values of the arguments with defaults,
            for which alone the trace is valid.
        optional (tuple[str]): Names of the arguments with the default None
            that are tensors here.
        guards (Guards): Conditions under which the trace is valid.
        input_type (type): Class of the inputs: ``torch.Tensor``, ``list`` or,
            for a tuple of one tensor, ``tuple``.
        training_only (bool): Whether the trace is valid in training mode only.
    """

    nodes: tuple
    arguments: tuple
    defaults: dict
    optional: tuple
    guards: Guards
    input_type: type
    training_only: bool

    @functools.cached_property
    def inputs(self):
        """tuple[fx.Node]: The placeholders."""
        return tuple(n for n in self.nodes if n.op == 'placeholder')

    @functools.cached_property
    def calls(self):
        """tuple[fx.Node]: All calls."""
        return tuple(
            n for n in self.nodes if n.op not in ('placeholder', 'output')
        )

    @property
    def output(self):
        """fx.Node: The node of the return value."""
        return self.nodes[-1]


def trace_block(module, cls):
    """Trace a module's forward pass in training mode, children as leaves.

    Args:
        module (nn.Module): The module; it is not changed.
        cls (type): Class whose ``forward`` is traced: the module's, or that
            before it was fused.

    Returns:
        tuple[Trace]: One trace for each type of input that the forward pass
        distinguishes, and for each choice of optional tensors that are given.

    Raises:
        UntraceableError: If the forward pass cannot be traced, or has side
            effects.
    """
    functions = functions_of(cls)
    if 'forward' not in functions:
        raise UntraceableError('it has no forward pass of its own')
    for name in functions:
        if name in module.__dict__:
            raise UntraceableError(f'its {name} was replaced on the instance')
    arguments, defaults = _arguments(functions['forward'])
    signature = _Signature(arguments, defaults, ())
    results = [_trace(module, cls, signature, torch.Tensor)]
    if checks_types(cls):
        results.append(_trace(module, cls, signature, list))
    results += [
        _trace(module, cls, variant, torch.Tensor)
        for variant in signature.variants()
    ]
    traces = tuple(t for t in results if isinstance(t, Trace))
    if not traces:
        # Heads and necks of classifiers take the features in a tuple.
        in_tuple = _trace(module, cls, signature, tuple)
        if isinstance(in_tuple, UntraceableError):
            raise results[0]
        traces = (in_tuple,)
    return traces


class _Signature(NamedTuple):
    """Arguments of a forward pass; the fields of :class:`Trace`."""

    arguments: tuple
    defaults: dict
    optional: tuple

    def variants(self):
        """Signatures in which optional tensors are given."""
        optional = [k for k, value in self.defaults.items() if value is None]
        several = len(optional) if len(optional) <= _MAX_OPTIONAL else 1
        for count in range(1, several + 1):
            for names in itertools.combinations(optional, count):
                defaults = {
                    name: value
                    for name, value in self.defaults.items()
                    if name not in names
                }
                yield self._replace(defaults=defaults, optional=names)


def _arguments(forward):
    """Names of the arguments, and values of those with defaults."""
    _, *parameters = inspect.signature(forward).parameters.values()
    defaults = {}
    for parameter in parameters:
        if parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise UntraceableError('it takes any number of arguments')
        if parameter.default is not parameter.empty:
            if not isinstance(parameter.default, (*_VALUES, type(None))):
                raise UntraceableError(
                    f'its argument {parameter.name} has a default that is '
                    'no plain value'
                )
            defaults[parameter.name] = parameter.default
    if len(defaults) == len(parameters):
        raise UntraceableError('it takes no tensor')
    return tuple(p.name for p in parameters), defaults


def checks_types(cls):
    """Whether a forward pass may depend on the types of its arguments.

    Args:
        cls (type): Class of a module.

    Returns:
        bool: Whether its functions call ``isinstance``.
    """
    return any(
        'isinstance' in getattr(f, '__code__', f).co_names
        for f in functions_of(cls).values()
        if hasattr(f, '__code__')
    )


def _trace(module, cls, signature, input_type):
    """Trace for one type of input, or the ``UntraceableError``."""
    defaults = signature.defaults
    recorder = _Recorder(module)
    tracer = _BlockTracer(input_type, recorder)
    try:
        with _as_in_training(module, cls):
            graph = tracer.trace(module, dict(defaults) or None)
    except UntraceableError as reason:
        # A new error: the old one would keep all frames of the trace alive.
        return UntraceableError(str(reason))
    except Exception as error:
        # Any code may fail on a proxy in place of a tensor.
        text = str(error).strip().split('\n')[0][:120]
        return UntraceableError(f'{type(error).__name__} in its trace: {text}')
    nodes = _without_argument_checks(graph, signature)
    parts = dict.fromkeys(
        path[:depth]
        for node in nodes
        if node.op == 'call_module'
        for path in [tuple(node.target.split('.'))]
        for depth in range(1, len(path) + 1)
    )
    guards = make_guards(module, cls, recorder.functions, parts)
    reads_training = any(
        'training' in code.co_names for code, _ in recorder.functions
    )
    return Trace(nodes, *signature, guards, input_type, reads_training)


def _without_argument_checks(graph, signature):
    """Nodes of a graph without the checks of arguments with defaults."""
    defaults = signature.defaults
    inputs = set(signature.arguments) - defaults.keys()
    constants = set()
    kept = []
    for node in graph.nodes:
        if node.op == 'placeholder':
            # That of ``key`` with a default is called ``key_1``, but an
            # argument may be called ``key_pos``.
            name = node.target
            if name not in inputs and (
                name in defaults or name.rpartition('_')[0] in defaults
            ):
                constants.add(node)
                continue
        elif node.op != 'output' and node.all_input_nodes:
            if constants.issuperset(node.all_input_nodes):
                constants.add(node)
                continue
        kept.append(node)
    return tuple(kept)


@contextlib.contextmanager
def _as_in_training(module, cls):
    """Context with a module of its plain class, in training mode."""
    before, training, own = type(module), module.training, module.__dict__
    kept = {
        key: (value, _freeze_container(value))
        for key, value in own.items()
        if key != 'training'
    }
    module.__class__ = cls
    own['training'] = True
    written = False
    try:
        yield
    finally:
        module.__class__ = before
        own['training'] = training
        for key in own.keys() - kept.keys() - {'training'}:
            del own[key]
            written = True
        for key, (value, contents) in kept.items():
            if (
                own.get(key) is not value
                or _freeze_container(value) != contents
            ):
                own[key] = _restore(value, contents)
                written = True
    if written:
        raise UntraceableError('its forward pass writes attributes')


def _freeze_container(value):
    """Frozen contents of a container; None for other values."""
    if isinstance(value, (list, dict, set)):
        return freeze(value)
    return None


def _restore(value, contents):
    """Give a container its contents back, in place."""
    if contents is None or not hasattr(contents, 'items'):
        return value
    value.clear()
    if isinstance(value, dict):
        value.update(_thaw(item) for item in contents.items)
    elif isinstance(value, list):
        value.extend(_thaw(item) for item in contents.items)
    else:
        value.update(_thaw(item) for item in contents.items)
    return value


def _thaw(frozen):
    if hasattr(frozen, 'kind') and hasattr(frozen, 'items'):
        return frozen.kind(_thaw(item) for item in frozen.items)
    return frozen


class _BlockProxy(fx.Proxy):
    """Proxy with the operators that work in place."""


def _in_place(function):
    def method(self, other):
        return self.tracer.create_proxy(
            'call_function', function, (self, other), {}
        )

    return method


for _name, _function in _IN_PLACE.items():
    setattr(_BlockProxy, _name, _in_place(_function))


class _TensorProxy(_BlockProxy):
    """Proxy of an input that is a tensor."""

    @property
    def __class__(self):
        """type: Class for ``isinstance``."""
        return torch.Tensor


class _ListProxy(_BlockProxy):
    """Proxy of an input that is a list."""

    @property
    def __class__(self):
        """type: Class for ``isinstance``."""
        return list


class _BlockTracer(fx.Tracer):
    """Tracer with the children of the traced module as leaves."""

    proxy_buffer_attributes = True

    def __init__(self, input_type, recorder):
        super().__init__(autowrap_modules=())
        self._input_type = input_type
        self._recorder = recorder
        self._paths = {}

    def trace(self, root, concrete_args=None):
        """See ``fx.Tracer``."""
        for name, part in root.named_modules(remove_duplicate=False):
            self._paths.setdefault(part, []).append(name)
        return super().trace(root, concrete_args)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """See ``fx.Tracer``; the recorder is on in the forward pass."""
        function, args = super().create_args_for_root(
            root_fn, is_module, concrete_args
        )
        recorder = self._recorder

        if self._input_type is tuple:
            args = [
                (arg[0],) if isinstance(arg, _BlockProxy) else arg
                for arg in args
            ]

        def forward(*args):
            with recorder.listening():
                return function(*args)

        return forward, args

    def create_proxy(self, *args, **kwargs):
        """See ``fx.Tracer``, whose own calls are not recorded."""
        with self._recorder.paused():
            return super().create_proxy(*args, **kwargs)

    def call_module(self, m, forward, args, kwargs):
        """See ``fx.Tracer``; every module is a leaf."""
        return self.create_proxy(
            'call_module', self.path_of_module(m), args, kwargs
        )

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        """See ``fx.Tracer``; makes proxies of tensors only."""
        if isinstance(attr_val, torch.Tensor):
            with self._recorder.paused():
                return super().getattr(attr, attr_val, parameter_proxy_cache)
        return attr_val

    def path_of_module(self, mod):
        """See ``fx.Tracer``; refuses modules that have several parents."""
        names = self._paths.get(mod)
        if names is None:
            raise UntraceableError(
                'it calls a module that is none of its parts'
            )
        if len({name.rpartition('.')[0] for name in names}) > 1:
            raise UntraceableError(
                f'{names[0]} is part of it in several places: '
                f'{", ".join(names)}'
            )
        return names[0]

    def proxy(self, node):
        """See ``fx.Tracer``."""
        self._recorder.count_node()
        if node.op == 'placeholder':
            if self._input_type is list:
                return _ListProxy(node, self)
            if self._input_type is torch.Tensor:
                return _TensorProxy(node, self)
        return _BlockProxy(node, self)

    def create_arg(self, a):
        """See ``fx.Tracer``; refuses tensors that are no parameters."""
        if isinstance(a, torch.Tensor) and not isinstance(a, fx.Proxy):
            raise UntraceableError('it uses a tensor that is no parameter')
        if isinstance(a, fx.Proxy):
            return a.node
        return super().create_arg(a)


class _Recorder:
    """Recorder of the calls of a forward pass while it is traced.

    A call that neither becomes a node nor is a pure function, such as one of
    random numbers or of a clock, makes the trace invalid, and so does a write
    to an object. Most of them are refused before they happen.

    Args:
        module (nn.Module): The module that is traced.

    Attributes:
        functions (list[tuple[CodeType, dict]]): Code and globals of the
            functions that ran.
    """

    def __init__(self, module):
        self.functions = []
        self._known_code = set()
        self._module = module
        self._nodes = 0
        # Stack of running calls that have to make a node.
        self._pending = []

    def listening(self):
        """Context in which the recorder is on."""
        return _Listening(self._on_frame, self._on_event)

    def paused(self):
        """Context in which the recorder is off."""
        return _Listening(None, None)

    def count_node(self):
        """Count a new node."""
        self._nodes += 1

    def _on_frame(self, frame, event, argument):
        if not _is_user_code(frame):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._on_opcode

    def _on_opcode(self, frame, event, argument):
        if event == 'opcode':
            code = frame.f_code
            if code.co_code[frame.f_lasti] in _STORE_OPCODES:
                raise UntraceableError(f'{code.co_name} writes attributes')
        return self._on_opcode

    def _on_event(self, frame, event, argument):
        if event == 'call':
            self._on_call(frame)
        elif event == 'c_call':
            if _is_user_code(frame):
                self._on_builtin(frame, argument)
        elif self._pending:
            callee, nodes, name = self._pending[-1]
            if callee is (frame if event == 'return' else argument):
                self._pending.pop()
                if nodes == self._nodes and event != 'c_exception':
                    raise UntraceableError(
                        f'it calls {name}, which is no part of the graph'
                    )

    def _on_call(self, frame):
        caller = frame.f_back
        if caller is None:
            return
        code = frame.f_code
        if _is_user_code(frame):
            if not _is_user_code(caller) and not _is_module_access(caller):
                raise UntraceableError(
                    f'{code.co_name} is called back by {caller.f_code.co_name}'
                )
            if id(code) not in self._known_code:
                self._known_code.add(id(code))
                self.functions.append((code, frame.f_globals))
        elif _is_user_code(caller) and not _is_module_access(frame):
            if frame.f_globals.get('__name__') not in _TENSOR_FUNCTIONS:
                raise UntraceableError(f'it calls {code.co_name}')
            self._pending.append((frame, self._nodes, code.co_name))

    def _on_builtin(self, frame, function):
        if id(function) in _PURE_BUILTINS:
            return
        owner = getattr(function, '__self__', None)
        name = getattr(function, '__name__', repr(function))
        if type(owner) in _CONTAINERS:
            if name in _MUTATING and self._is_shared(owner, frame):
                raise UntraceableError(f'it changes a container by {name}')
            return
        module = getattr(function, '__module__', None)
        if type(owner) in _VALUES or module in ('math', '_operator'):
            return
        home = module or getattr(owner, '__module__', None) or ''
        if home.partition('.')[0] != 'torch':
            raise UntraceableError(f'it calls {name}')
        self._pending.append((function, self._nodes, name))

    def _is_shared(self, owner, frame):
        scopes = [
            self._module.__dict__,
            frame.f_globals,
            *(vars(cls) for cls in type(self._module).__mro__),
            {
                name: frame.f_locals.get(name)
                for name in frame.f_code.co_freevars
            },
        ]
        return any(
            _contains(value, owner)
            for scope in scopes
            for value in scope.values()
        )


class _Listening:
    """Context with the given trace and profile functions of this thread."""

    def __init__(self, trace, profile):
        self._functions = trace, profile

    def __enter__(self):
        functions = self._functions
        self._functions = sys.gettrace(), sys.getprofile()
        self._set(*functions)

    def __exit__(self, *error):
        self._set(*self._functions)

    @staticmethod
    def _set(trace, profile):
        sys.setprofile(profile)
        sys.settrace(trace)


def _contains(value, owner, depth=0):
    if value is owner:
        return True
    if depth < 2 and type(value) in (list, dict, tuple):
        items = value.values() if isinstance(value, dict) else value
        return any(_contains(item, owner, depth + 1) for item in items)
    return False


def _is_user_code(frame):
    """Whether a frame's code is of neither torch, Python nor this module."""
    return _is_user_module(frame.f_globals.get('__name__', ''))


@functools.lru_cache(maxsize=4096)
def _is_user_module(name):
    package = name.partition('.')[0]
    return not (
        package == 'torch'
        or package in sys.stdlib_module_names
        and package != '__main__'
        or package.startswith('namedtuple_')
        or name == __name__
    )


def _is_module_access(frame):
    name = frame.f_globals.get('__name__', '')
    return name == __name__ or name.startswith(_MODULE_ACCESS)
