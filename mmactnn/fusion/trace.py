"""Block-local traces: the calls of one module's forward pass as a graph."""

import contextlib
import dataclasses
import dis
import functools
import inspect
import operator
import sys

import torch
from torch import fx

from ..modules.functions import functions_of
from .guards import Guards, freeze, make_guards

# Of torch's own Python code, what reads a module and computes nothing.
_READING = (
    'torch.fx',
    'torch.nn.modules.module',
    'torch.nn.modules.container',
    'torch._jit_internal',
    'torch.utils._pytree',
    'torch.overrides',
)
# Of the rest, functions of tensors, which see a proxy. Whatever else torch has
# changes how others run: checkpointing, autocast, gradients or none.
_COMPUTING = (
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
_WRITES = frozenset(
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


class Untraceable(Exception):
    """Reason why the forward pass of a module has no trace."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Calls of a module's forward pass.

    Attributes:
        nodes (tuple[fx.Node]): Placeholders of the tensors, calls in their
            order, and the output. A call of a module has its qualified name
            within the traced one as target.
        defaults (dict[str, object]): Arguments that the trace holds for, and
            their values.
        guards (Guards): What the trace rests on.
        takes (type): Class of the inputs: ``torch.Tensor``, ``list`` or, for
            a tuple of one tensor, ``tuple``.
        only_training (bool): Whether the trace holds in training mode only.
    """

    nodes: tuple
    defaults: dict
    guards: Guards
    takes: type
    only_training: bool

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
        """fx.Node: The node of what is returned."""
        return self.nodes[-1]


def trace_block(module, cls):
    """Trace a module's forward pass in training mode, children as leaves.

    Args:
        module (nn.Module): The module; it is left as it was.
        cls (type): Class whose ``forward`` is traced: the module's, or the
            one that it had before it was fused.

    Returns:
        tuple[Trace]: One for each kind of input that the forward pass tells
        apart.

    Raises:
        Untraceable: If the forward pass cannot be traced, or does more than
            call and return.
    """
    functions = functions_of(cls)
    if 'forward' not in functions:
        raise Untraceable('it has no forward pass of its own')
    for name in functions:
        if name in module.__dict__:
            raise Untraceable(f'its {name} was replaced on the instance')
    signature = inspect.signature(functions['forward'])
    _, *parameters = signature.parameters.values()
    defaults = {}
    for parameter in parameters:
        if parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise Untraceable('it takes any number of arguments')
        if parameter.default is not parameter.empty:
            if not isinstance(parameter.default, (*_VALUES, type(None))):
                raise Untraceable(
                    f'its argument {parameter.name} has a default that is '
                    'no plain value'
                )
            defaults[parameter.name] = parameter.default
    if len(defaults) == len(parameters):
        raise Untraceable('it takes no tensor')
    results = [_trace(module, cls, defaults, torch.Tensor)]
    if _tells_apart(functions):
        results.append(_trace(module, cls, defaults, list))
    traces = tuple(t for t in results if isinstance(t, Trace))
    if not traces:
        # Heads and necks of classifiers take the features in a tuple.
        in_tuple = _trace(module, cls, defaults, tuple)
        if isinstance(in_tuple, Untraceable):
            raise results[0]
        traces = (in_tuple,)
    return traces


def _tells_apart(functions):
    return any(
        'isinstance' in getattr(f, '__code__', f).co_names
        for f in functions.values()
        if hasattr(f, '__code__')
    )


def _trace(module, cls, defaults, takes):
    recorder = _Recorder(module)
    tracer = _BlockTracer(takes, recorder)
    try:
        with _as_in_training(module, cls):
            graph = tracer.trace(module, dict(defaults) or None)
    except Untraceable as reason:
        # Not itself: it would keep all frames of the trace alive.
        return Untraceable(str(reason))
    except Exception as error:
        # Whatever a proxy meets that is no tensor.
        text = str(error).strip().split('\n')[0][:120]
        return Untraceable(f'{type(error).__name__} in its trace: {text}')
    nodes = _nodes_that_count(graph, defaults)
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
    return Trace(nodes, defaults, guards, takes, reads_training)


def _nodes_that_count(graph, defaults):
    """Nodes of a graph without the checks of arguments with defaults."""
    constants = set()
    kept = []
    for node in graph.nodes:
        if node.op == 'placeholder':
            name = node.target
            if name in defaults or name.rpartition('_')[0] in defaults:
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
    """Let a module be of its plain class, in training mode, for a while."""
    before, training, own = type(module), module.training, module.__dict__
    kept = {
        key: (value, _contents(value))
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
            if own.get(key) is not value or _contents(value) != contents:
                own[key] = _restored(value, contents)
                written = True
    if written:
        raise Untraceable('its forward pass writes attributes')


def _contents(value):
    if isinstance(value, (list, dict, set)):
        return freeze(value)
    return None


def _restored(value, contents):
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
    """Proxy that knows the operators which work in place."""


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
        """type: The class that ``isinstance`` sees."""
        return torch.Tensor


class _ListProxy(_BlockProxy):
    """Proxy of an input that is a list."""

    @property
    def __class__(self):
        """type: The class that ``isinstance`` sees."""
        return list


class _BlockTracer(fx.Tracer):
    """Tracer with the children of the traced module as leaves."""

    proxy_buffer_attributes = True

    def __init__(self, takes, recorder):
        super().__init__(autowrap_modules=())
        self._takes = takes
        self._recorder = recorder
        self._paths = {}

    def trace(self, root, concrete_args=None):
        """See ``fx.Tracer``."""
        for name, part in root.named_modules(remove_duplicate=False):
            self._paths.setdefault(part, []).append(name)
        return super().trace(root, concrete_args)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """See ``fx.Tracer``; listens while the forward pass runs."""
        function, args = super().create_args_for_root(
            root_fn, is_module, concrete_args
        )
        recorder = self._recorder

        if self._takes is tuple:
            args = [
                (arg[0],) if isinstance(arg, _BlockProxy) else arg
                for arg in args
            ]

        def forward(*args):
            with recorder.listening():
                return function(*args)

        return forward, args

    def create_proxy(self, *args, **kwargs):
        """See ``fx.Tracer``, in which nothing is to be heard."""
        with self._recorder.paused():
            return super().create_proxy(*args, **kwargs)

    def call_module(self, m, forward, args, kwargs):
        """See ``fx.Tracer``; every module is a leaf."""
        return self.create_proxy(
            'call_module', self.path_of_module(m), args, kwargs
        )

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        """See ``fx.Tracer``; looks for tensors only."""
        if isinstance(attr_val, torch.Tensor):
            with self._recorder.paused():
                return super().getattr(attr, attr_val, parameter_proxy_cache)
        return attr_val

    def path_of_module(self, mod):
        """See ``fx.Tracer``; modules at home in two places have no path."""
        names = self._paths.get(mod)
        if names is None:
            raise Untraceable('it calls a module that is none of its parts')
        if len({name.rpartition('.')[0] for name in names}) > 1:
            raise Untraceable(
                f'{names[0]} is part of it in several places: '
                f'{", ".join(names)}'
            )
        return names[0]

    def proxy(self, node):
        """See ``fx.Tracer``."""
        self._recorder.note_node()
        if node.op == 'placeholder':
            if self._takes is list:
                return _ListProxy(node, self)
            if self._takes is torch.Tensor:
                return _TensorProxy(node, self)
        return _BlockProxy(node, self)

    def create_arg(self, a):
        """See ``fx.Tracer``; refuses tensors that are no parameters."""
        if isinstance(a, torch.Tensor) and not isinstance(a, fx.Proxy):
            raise Untraceable('it uses a tensor that is no parameter')
        if isinstance(a, fx.Proxy):
            return a.node
        return super().create_arg(a)


class _Recorder:
    """Listens to what a forward pass calls while it is traced.

    Calls that neither become a node nor are known to compute the same thing
    from the same arguments, such as those of random numbers or of a clock,
    make the trace worthless, and so does whatever is written to objects. Most
    of them are refused before they happen.

    Args:
        module (nn.Module): The module that is traced.

    Attributes:
        functions (list[tuple[CodeType, dict]]): Code and globals of the
            functions that ran.
    """

    def __init__(self, module):
        self.functions = []
        self._seen = set()
        self._module = module
        self._nodes = 0
        # Calls under way that have to make a node.
        self._waiting = []

    def listening(self):
        """A context in which the recorder listens."""
        return _Listening(self._on_frame, self._on_event)

    def paused(self):
        """A context in which it does not."""
        return _Listening(None, None)

    def note_node(self):
        """Take note of a new node."""
        self._nodes += 1

    def _on_frame(self, frame, event, argument):
        if not _is_users(frame):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._on_opcode

    def _on_opcode(self, frame, event, argument):
        if event == 'opcode':
            code = frame.f_code
            if code.co_code[frame.f_lasti] in _WRITES:
                raise Untraceable(f'{code.co_name} writes attributes')
        return self._on_opcode

    def _on_event(self, frame, event, argument):
        if event == 'call':
            self._on_call(frame)
        elif event == 'c_call':
            if _is_users(frame):
                self._on_builtin(frame, argument)
        elif self._waiting:
            key, nodes, name = self._waiting[-1]
            if key is (frame if event == 'return' else argument):
                self._waiting.pop()
                if nodes == self._nodes and event != 'c_exception':
                    raise Untraceable(
                        f'it calls {name}, which is no part of the graph'
                    )

    def _on_call(self, frame):
        caller = frame.f_back
        if caller is None:
            return
        code = frame.f_code
        if _is_users(frame):
            if not _is_users(caller) and not _is_reading(caller):
                raise Untraceable(
                    f'{code.co_name} is called back by {caller.f_code.co_name}'
                )
            if id(code) not in self._seen:
                self._seen.add(id(code))
                self.functions.append((code, frame.f_globals))
        elif _is_users(caller) and not _is_reading(frame):
            if frame.f_globals.get('__name__') not in _COMPUTING:
                raise Untraceable(f'it calls {code.co_name}')
            self._waiting.append((frame, self._nodes, code.co_name))

    def _on_builtin(self, frame, function):
        if id(function) in _PURE_BUILTINS:
            return
        owner = getattr(function, '__self__', None)
        name = getattr(function, '__name__', repr(function))
        if type(owner) in _CONTAINERS:
            if name in _MUTATING and self._is_shared(owner, frame):
                raise Untraceable(f'it changes a container by {name}')
            return
        module = getattr(function, '__module__', None)
        if type(owner) in _VALUES or module in ('math', '_operator'):
            return
        home = module or getattr(owner, '__module__', None) or ''
        if home.partition('.')[0] != 'torch':
            raise Untraceable(f'it calls {name}')
        self._waiting.append((function, self._nodes, name))

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
            _holds(value, owner)
            for scope in scopes
            for value in scope.values()
        )


class _Listening:
    """Context with other trace and profile functions of this thread."""

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


def _holds(value, owner, depth=0):
    if value is owner:
        return True
    if depth < 2 and type(value) in (list, dict, tuple):
        items = value.values() if isinstance(value, dict) else value
        return any(_holds(item, owner, depth + 1) for item in items)
    return False


def _is_users(frame):
    """Whether a frame runs code of neither torch nor Python nor this file."""
    return _is_users_name(frame.f_globals.get('__name__', ''))


@functools.lru_cache(maxsize=4096)
def _is_users_name(name):
    package = name.partition('.')[0]
    return not (
        package == 'torch'
        or package in sys.stdlib_module_names
        and package != '__main__'
        or package.startswith('namedtuple_')
        or name == __name__
    )


def _is_reading(frame):
    name = frame.f_globals.get('__name__', '')
    return name == __name__ or name.startswith(_READING)
