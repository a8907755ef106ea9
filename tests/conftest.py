"""Fixtures that all tests share.

Torch and what needs it are imported within them: the process that only hands
out tests to others does without, and starts in a fraction of the time.
"""

import gc
import random
import re
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest

# Tests that start processes, directly or by what these names stand for.
_STARTS = re.compile('run_in_fork|support.processes|in_two_processes')

# Support modules that check for tests.
pytest.register_assert_rewrite('support.recipe_tests', 'support.dist_train')


def pytest_addoption(parser):
    """Tests that take long are for whoever asks for them."""
    parser.addoption(
        '--full',
        action='store_true',
        help='also what takes long and is much like other tests',
    )


def pytest_configure(config):
    """Declare the mark of such tests."""
    config.addinivalue_line('markers', 'full: is run with --full alone')


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Have one process run all files that start others.

    These are forks of servers, which take seconds to start. Many processes
    would have to wait for that one.
    """
    if config.getoption('dist') != 'loadfile' or len(config.option.tx) > 4:
        return None
    from xdist.scheduler import LoadFileScheduling

    @cache
    def starts_processes(file):
        return bool(_STARTS.search((config.rootpath / file).read_text()))

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return 'files that fork' if starts_processes(file) else file

    return Scheduling(config, log)


def pytest_collection(session):
    """Garbage collection is off: modules that are imported here stay."""
    gc.disable()


def pytest_collection_modifyitems(config, items):
    """Start with what takes longest, lest processes wait for one another."""
    longest = ('test_integration', 'test_tools')
    items.sort(key=lambda item: item.path.parent.name not in longest)
    import torch

    if not torch.cuda.is_available():
        # Before anything is set up for them.
        skip = pytest.mark.skip(reason='no GPU is available')
        for item in items:
            params = item.callspec.params if hasattr(item, 'callspec') else {}
            if params.get('device') == 'cuda':
                item.add_marker(skip)
    if not config.getoption('--full'):
        skip = pytest.mark.skip(reason='takes long: pytest --full')
        for item in items:
            if item.get_closest_marker('full'):
                item.add_marker(skip)


def pytest_collection_finish():
    """Spare the collections of garbage that MMEngine asks for what is there.

    All that was imported and collected, which takes them seconds.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_generate_tests(metafunc):
    """Run classes that name recipes with each of them in turn."""
    recipes = getattr(metafunc.cls, 'recipes', None)
    if recipes is not None:
        if not metafunc.config.getoption('--full'):
            alike = metafunc.cls.alike
            recipes = [name for name in recipes if name not in alike]
        metafunc.parametrize('name', recipes, scope='class')


@pytest.fixture(params=['cpu', 'cuda'])
def device(request):
    """Every device that the tested code has kernels for."""
    import torch

    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Start every test from the same random state."""
    import numpy as np
    import torch

    import mmactnn

    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    # Rounding, which follows it, does not depend on the tests before.
    mmactnn.manual_seed(None)
    return value


@pytest.fixture(scope='session', autouse=True)
def _aliases_are_errors():
    """Outputs of an op that share memory fail everywhere.

    torch warns of them alone unless the environment has ``CI``.
    """
    from torch._functorch import config as functorch_config

    name = 'error_on_custom_op_aliasing'
    with pytest.MonkeyPatch.context() as patch:
        # Older versions of torch do not look.
        if hasattr(functorch_config, name):
            patch.setattr(functorch_config, name, True)
        yield


@pytest.fixture(autouse=True)
def _no_scope(monkeypatch):
    """Every test starts without a default scope, and leaves none behind."""
    from mmengine.registry import DefaultScope

    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())


@pytest.fixture(scope='session', autouse=True)
def _quick():
    """Spare what takes longer than tests do."""
    from support.quick_mmengine import quick_mmengine
    from support.quick_torch import quick_torch

    with pytest.MonkeyPatch.context() as patch:
        quick_mmengine(patch)
        quick_torch(patch)
        yield


@pytest.fixture(scope='session')
def run_in_fork():
    """See :func:`support.forks.start_forks`."""
    from support.forks import start_forks

    with start_forks() as run:
        yield run


@pytest.fixture(scope='session')
def digits_home(tmp_path_factory) -> Path:
    """A directory to run tools in: it holds a tiny set in ``data/digits``.

    The configs name their data relative to the working directory.
    """
    from support.digits import make_digits

    home = tmp_path_factory.mktemp('home')
    make_digits(home / 'data' / 'digits')
    return home
