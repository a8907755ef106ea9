"""The order of the package's parts, and what the documentation derives."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from support.tools import ROOT

from mmactnn.registry import default_registry

PACKAGE = ROOT / 'mmactnn'
# From the inside out: a part imports those of lines before its own.
ORDER = (
    ('extension', 'modules', 'random'),
    ('ops', 'registry'),
    ('config',),
    ('precision',),
    ('codes',),
    ('autograd', 'offload'),
    ('layers',),
    ('functional',),
    ('fusion',),
    ('adapters', 'compiler', 'memory', 'segments'),
    ('convert', 'names'),
    ('compat', 'graphs'),
    ('mmlab',),
    ('hooks',),
    ('__init__',),
    ('__main__',),
)
LEVEL = {part: i for i, line in enumerate(ORDER) for part in line}
# Imports within functions, with the reason.
LATE = {
    ('registry', 'mmlab.registry'): 'MMEngine is imported on demand only',
    ('mmlab.waiting', 'mmlab.registry'): 'the same',
    ('fusion.runner', 'fusion.find'): 'a pickle plans its blocks again',
    ('layers.gateway', 'modules.graph_break'): 'it imports the compiler',
    ('fusion.block', 'modules.graph_break'): 'the same',
    ('segments.checkpoint', 'modules.graph_break'): 'the same',
    ('segments.block', 'modules.graph_break'): 'the same',
    ('modules.eager', 'modules.graph_break'): 'the same',
    ('compiler.options', 'compiler.backends'): 'the same',
}


def module_of(path):
    """Name of a file as a module, within the package."""
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    if len(parts) > 1 and parts[-1] == '__init__':
        parts = parts[:-1]
    return '.'.join(parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob('*.py'))}


def part_of(module):
    return module.partition('.')[0]


def imports_of(path):
    """Modules of the package that a file imports, and whether at load."""
    # Not `import mmactnn` from a path that happens to be another one's.
    package = ('mmactnn', *path.relative_to(PACKAGE).parts[:-1])
    tree = ast.parse(path.read_text())
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = ()
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            base = base if node.level else ()
            base = '.'.join([*base, *filter(None, [node.module])])
            names = [f'{base}.{alias.name}' for alias in node.names]
        for name in names:
            if part_of(name) == 'mmactnn':
                yield _module_named(name), id(node) not in late


def _module_named(name):
    """The longest beginning of a dotted name that is a module."""
    name = name.partition('.')[2]
    while name and name not in FILES:
        name = name.rpartition('.')[0]
    return name or '__init__'


IMPORTS = {module: list(imports_of(path)) for module, path in FILES.items()}


def test_every_part_has_a_place():
    assert LEVEL.keys() == set(map(part_of, FILES))


def test_few_modules_at_the_root():
    assert len(list(PACKAGE.glob('*.py'))) <= 8


def test_no_arrow_upwards():
    upwards = {
        f'{module} -> {target}'
        for module, targets in IMPORTS.items()
        for target, at_load in targets
        if at_load
        and part_of(module) != part_of(target)
        and LEVEL[part_of(module)] <= LEVEL[part_of(target)]
    }
    assert not upwards


def test_no_cycle_within_a_part():
    """Imports of modules; an ``__init__`` may import all of its package."""
    arrows = {
        module: {
            target
            for target, at_load in targets
            if at_load and target != module and '.' in target
        }
        for module, targets in IMPORTS.items()
        if '.' in module
    }
    left = dict(arrows)
    while left:
        ready = [m for m, targets in left.items() if not targets & left.keys()]
        assert ready, f'a cycle among {sorted(left)}'
        for module in ready:
            del left[module]


def test_late_imports_have_a_reason():
    late = {
        (module, target)
        for module, targets in IMPORTS.items()
        for target, at_load in targets
        if not at_load
    }
    assert late == LATE.keys()


@pytest.mark.parametrize('part', sorted(LEVEL.keys() - {'__init__'}))
def test_documented(part):
    """The table of docs/architecture.md names every part."""
    text = (ROOT / 'docs' / 'architecture.md').read_text()
    name = f'{part}/' if (PACKAGE / part).is_dir() else f'{part}.py'
    assert f'`mmactnn/{name}`' in text


LAYERS = (ROOT / 'docs' / 'layers.md').read_text()
ROWS = re.compile(r'^\| `(Q\w+)`([^|]*) \| `([\w.]+)` \| `(\w+)` \|', re.M)


def rows_of_entries():
    """Rows as the registry has them, layers of other packages included."""
    for path in (PACKAGE / 'adapters').glob('mm*.py'):
        importlib.import_module(f'mmactnn.adapters.{path.stem}')
    for entry in default_registry.layers.values():
        if part_of(entry.layer.__module__) != 'mmactnn':
            continue
        package = part_of(entry.parent.__module__).replace('torch', 'nn')
        parent = f'{package}.{entry.parent.__name__}'
        first, *names = entry.names
        yield first, set(names), parent, entry.layer.kind


def test_table_of_layers():
    """docs/layers.md has what is registered, no more and no less."""
    rows = [
        (name, set(re.findall(r'`(\w+)`', names)), parent, kind)
        for name, names, parent, kind in ROWS.findall(LAYERS)
    ]
    assert len(rows) == LAYERS.count('\n| `')
    assert sorted(rows, key=str) == sorted(rows_of_entries(), key=str)


def test_no_paths_of_a_machine():
    for path in [*Path(ROOT / 'docs').glob('*.md'), ROOT / 'README.md']:
        assert not re.search(r'(?<!\w)/(home|root|tmp)/', path.read_text())
