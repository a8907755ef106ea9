"""Registrations that do not fit: one error each, and nothing stays behind."""

import importlib
import operator
import pkgutil

import pytest
import torch
from torch import fx, nn

from mmactnn import QReLU, SmoothLayer, convert_model
from mmactnn.adapters import Adapter, find_adapters
from mmactnn.fusion import Site
from mmactnn.modules.functions import fingerprint, functions_of
from mmactnn.registry import ConfigNames, Registry, default_registry


class Plain(nn.Module):
    """Stands for a layer of torch."""

    def forward(self, x):
        return x


class QPlain(SmoothLayer, Plain):
    pass


class QPlainToo(SmoothLayer, Plain):
    pass


class WithoutMixin(Plain):
    pass


class WithoutKind(SmoothLayer, Plain):
    kind = None


class QOther(SmoothLayer, nn.SiLU):
    pass


class QIndirect(SmoothLayer, WithoutMixin):
    pass


def rule(call):
    return (call.input,)


@pytest.fixture
def registry():
    return Registry()


def add_layer(registry, layer=QPlain, parent=Plain, **changes):
    arguments = dict(names=(), aliases={}, saved_by_torch=rule, examples=None)
    registry.add_layer(layer, parent, **{**arguments, **changes})


class TestLayers:
    @pytest.mark.parametrize(
        'layer, changes, message',
        [
            ('QPlain', {}, 'layer must be a subclass of nn.Module'),
            (QOther, {}, 'must be a subclass of Plain'),
            (WithoutMixin, {}, 'must have the mixin QuantizedLayer'),
            (QIndirect, {}, 'stands for WithoutMixin'),
            (WithoutKind, {}, 'attribute kind'),
            (QPlain, dict(saved_by_torch=None), 'without a rule'),
        ],
    )
    def test_does_not_fit(self, registry, layer, changes, message):
        with pytest.raises(TypeError, match=message):
            add_layer(registry, layer, **changes)
        assert not registry.layers

    @pytest.mark.parametrize(
        'layer, changes, message',
        [
            (QPlain, {}, 'registered already'),
            (QPlainToo, {}, 'Plain has QPlain already'),
            (
                QOther,
                dict(parent=nn.SiLU, names=['QPlain']),
                "the name 'QPlain' is that of QPlain",
            ),
            (
                QOther,
                dict(parent=nn.SiLU, aliases={'their.Plain': []}),
                'their.Plain has QPlain already',
            ),
        ],
    )
    def test_registered_twice(self, registry, layer, changes, message):
        add_layer(registry, aliases={'their.Plain': []})
        with pytest.raises(ValueError, match=message):
            add_layer(registry, layer, **changes)
        assert list(registry.layers) == [QPlain]


def no_sites(block):
    return ()


class TestPatterns:
    @pytest.mark.parametrize(
        'match, name, layers, message',
        [
            (None, 'none', (), 'must be a function'),
            (lambda: (), 'none', (), 'must take the trace of a block'),
            (no_sites, no_sites, (), 'must have a name'),
            (no_sites, 'none', ('QReLU',), 'must be classes'),
        ],
    )
    def test_does_not_fit(self, registry, match, name, layers, message):
        with pytest.raises(TypeError, match=message):
            registry.add_pattern(match, name, layers)
        assert not registry.patterns

    def test_registered_twice(self, registry):
        registry.add_pattern(no_sites, 'none', ())
        with pytest.raises(ValueError, match="'none' is registered already"):
            registry.add_pattern(no_sites, 'none', ())


class Doubled(nn.Module):
    """Its ReLU's output has two readers."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(x)
        return x + x * 2


def site_of(nodes, inputs):
    return Site(nodes, inputs, ())


class TestSites:
    """Sites that are no piece of the trace."""

    @pytest.mark.parametrize(
        'make, error, message',
        [
            (lambda trace: 'site', TypeError, 'must yield sites'),
            (
                lambda trace: site_of((), trace.inputs),
                ValueError,
                'other calls than those',
            ),
            (
                lambda trace: site_of(fx.Graph().nodes, trace.inputs),
                ValueError,
                'other calls than those',
            ),
            (
                lambda trace: site_of(trace.calls[:2], trace.inputs),
                ValueError,
                'read outside',
            ),
            (
                lambda trace: site_of(trace.calls, trace.calls[:1]),
                ValueError,
                'a value of its own',
            ),
        ],
    )
    def test_refused(self, make, error, message, monkeypatch):
        def match(block):
            assert block.trace.calls[-1].target is operator.add
            yield make(block.trace)

        patterns = dict(default_registry.patterns)
        monkeypatch.setattr(default_registry, 'patterns', patterns)
        default_registry.add_pattern(match, 'wrong', (QReLU,))
        model = Doubled()
        with pytest.raises(error, match=message) as raised:
            convert_model(model)
        assert "'wrong'" in str(raised.value)
        # The call has changed no layer.
        assert type(model.relu) is nn.ReLU


class QDoubled(Adapter, Doubled):
    def adapted_forward(self, x):
        return torch.relu(x) * 3


class QDoubledToo(QDoubled):
    pass


class WithoutForward(Adapter, Doubled):
    pass


class WithoutMethod(QDoubled):
    replaces = ('forward', 'forward_single')


class TestAdapters:
    @pytest.mark.parametrize(
        'adapter, target, message',
        [
            (QDoubled, 'Doubled', 'target must be a subclass of nn.Module'),
            (QDoubled, Plain, 'must be a subclass of Adapter and, directly'),
            (Doubled, Doubled, 'must be a subclass of Adapter and, directly'),
            (WithoutForward, Doubled, 'must define adapted_forward'),
            (WithoutMethod, Doubled, 'forward_single'),
        ],
    )
    def test_does_not_fit(self, registry, adapter, target, message):
        with pytest.raises(TypeError, match=message):
            registry.add_adapter(adapter, target, (), ())
        assert not registry.adapters

    def test_registered_twice(self, registry):
        registry.add_adapter(QDoubled, Doubled, (), ())
        with pytest.raises(ValueError, match='has the adapter QDoubled'):
            registry.add_adapter(QDoubledToo, Doubled, (), ())

    def test_other_sources_are_refused(self, registry):
        known = fingerprint(QDoubled._functions)
        for fingerprints, adapted in (
            ((), True),
            (['0' * 16, known], True),
            (['0' * 16], False),
        ):
            registry.adapters.clear()
            registry.add_adapter(QDoubled, Doubled, (), fingerprints)
            found = find_adapters(nn.Sequential(Doubled()), registry)
            assert bool(found.plans) is adapted
            assert bool(found.refused) is not adapted
        _, reason = found.refused['0']
        assert 'is not the one that the adapter QDoubled' in reason

    def test_fingerprints_are_of_what_is_computed(self):
        class Known:
            def forward(self, x):
                return self.relu(x + 1)

        class Alike:
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                """Annotated, documented and laid out in another way."""
                return self.relu(
                    x + 1  # and commented
                )

        class Other:
            def forward(self, x):
                return self.relu(x + 2)

        known, alike, other = (
            fingerprint({'forward': cls.forward})
            for cls in (Known, Alike, Other)
        )
        assert known == alike != other

    def test_those_of_the_package_know_the_installed_sources(self):
        for name in ('mmdet', 'mmseg'):
            importlib.import_module(f'mmactnn.adapters.{name}')
        entries = default_registry.adapters.values()
        assert len(entries) >= 6
        for entry in entries:
            # Sources matter where a function is replaced.
            assert entry.fingerprints or not entry.adapter._functions
            assert entry.adapter.matches_source(entry.fingerprints)


class Alike(nn.Module):
    """Computes as Plain, which it does not derive from."""

    def forward(self, x):
        return x


class TestAliases:
    def add(self, registry, known):
        name = f'{Alike.__module__}.{Alike.__qualname__}'
        rule = lambda call: ()  # noqa: E731
        registry.add_layer(QPlain, Plain, (), {name: known}, rule, None)

    def test_of_a_known_source(self, registry):
        self.add(registry, ['0' * 16, fingerprint(functions_of(Alike))])
        entry, reason = registry.find_layer(Alike())
        assert entry.layer is QPlain and reason is None

    def test_of_another_source(self, registry, monkeypatch):
        self.add(registry, [fingerprint(functions_of(Alike))])
        monkeypatch.setattr(Alike, 'forward', lambda self, x: x + 1)
        entry, reason = registry.find_layer(Alike())
        assert entry is None
        assert 'not the one that QPlain was written for' in reason

    def test_must_be_a_dict(self, registry):
        with pytest.raises(TypeError, match="of their sources, got .'their"):
            registry.add_layer(
                QPlain, Plain, (), ['their.Plain'], lambda call: (), None
            )
        assert not registry.layers

    def test_those_of_the_package_know_the_installed_sources(self):
        for entry in list(default_registry.layers.values()):
            for alias in entry.aliases:
                cls = pkgutil.resolve_name(alias)
                module = cls.__new__(cls)
                found, reason = default_registry.find_layer(module)
                assert found is entry, (alias, reason)


class Names(ConfigNames):
    """Config names in a dict."""

    def __init__(self, **taken):
        self.names = taken

    def holder(self, name):
        return self.names.get(name)

    def add(self, names, cls):
        self.names.update(dict.fromkeys(names, cls))

    def add_lazily(self, name, path):
        self.names[name] = path


class TestConfigNames:
    def test_of_now_and_of_later(self, registry):
        names, rule = Names(), lambda call: ()
        registry.add_layer(QPlain, Plain, ('P',), {}, rule, None)
        assert registry.subscribe(names) == []
        registry.add_provider('package', 'its.module', ['QThere'])
        registry.add_adapter(QDoubled, Doubled, ('D',), ())
        assert names.names == {
            'QPlain': QPlain,
            'P': QPlain,
            'QThere': 'its.module:QThere',
            'QDoubled': QDoubled,
            'D': QDoubled,
        }
        assert registry.config_names == names.names.keys()

    def test_names_of_others(self, registry):
        rule = lambda call: ()  # noqa: E731
        registry.subscribe(Names(QPlain=int, D=str))
        with pytest.raises(ValueError, match="'QPlain' for <class 'int'>"):
            registry.add_layer(QPlain, Plain, (), {}, rule, None)
        with pytest.raises(ValueError, match="'D' for <class 'str'>"):
            registry.add_adapter(QDoubled, Doubled, ('D',), ())
        assert not registry.layers and not registry.adapters

    def test_names_that_others_had_before(self, registry):
        names, rule = Names(P=int), lambda call: ()
        registry.add_layer(QPlain, Plain, ('P',), {}, rule, None)
        (clash,) = registry.subscribe(names)
        assert clash == "the name 'P' is that of <class 'int'>"
        assert names.names == {'P': int, 'QPlain': QPlain}
