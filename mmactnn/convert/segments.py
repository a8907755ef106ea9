"""Choice of the blocks that run as segments, and their settings."""

from ..codes.quantizer import LayerQuantizer
from ..segments import DEFAULT_BITS, FoundSegments, find_segments

# Bits an element of a tensor that is kept exactly, in float32.
_EXACT_BITS = 32


def find_blocks(model, level, chosen, fusions, why_filtered):
    """Find the blocks of a model that a level recomputes.

    Args:
        model (nn.Module): The model.
        level (Level): The level.
        chosen (Sequence): Layers that would be converted without segments.
        fusions (dict[str, Fusion]): Blocks that would run fused.
        why_filtered (Callable): Maps the name of a block and the block to the
            reason why filters leave it out, or to None.

    Returns:
        FoundSegments: The blocks; none if the level does not recompute.
    """
    if not level.recompute or level.exact:
        return FoundSegments({}, {}, {})
    targets = {item.module: item.target for item in chosen}
    fused = {norm for fusion in fusions.values() for norm in fusion.norms}
    norms = {item.module for item in chosen if item.target.kind == 'norm'}

    def bits_of(layer):
        target = targets.get(layer)
        if target is None:
            # Unknown layers without parameters may keep nothing.
            return (_EXACT_BITS if layer._parameters else 0), 0
        if target.kind == 'mask':
            return 1, 1
        bits = target.level_bits(level)
        return (_EXACT_BITS if bits is None else bits), 0

    def why_not(name, module):
        if 'forward' in module.__dict__:
            return 'its forward was replaced on the instance'
        parts = norms.intersection(module.modules())
        if parts and len(parts & fused) * 2 >= len(parts):
            return 'runs fused from fewer bits'
        if segment_bits(name, level) is None:
            return 'exact by a rule'
        return why_filtered(name, module)

    return find_segments(model, bits_of, why_not, DEFAULT_BITS)


def segment_bits(name, level):
    """Bits an element of the input of a segment.

    Args:
        name (str): Qualified name of the block.
        level (Level): The level, whose rules count.

    Returns:
        int, optional: None if the block is no segment.
    """
    rule = level.rule_for(name)
    return rule.bits if rule is not None and rule.sets_bits else DEFAULT_BITS


def segment_quantizer(name, level, group_size, generator, cache):
    """Codec of a segment.

    Args:
        name (str): Qualified name of the block.
        level (Level): The level.
        group_size (int): Elements a range, where no rule sets it.
        generator (RoundingGenerator): Source of random bits.
        cache (PayloadCache): Payloads that the model shares.

    Returns:
        LayerQuantizer: It refuses payloads of fewer bits.
    """
    rule = level.rule_for(name)
    return LayerQuantizer(
        segment_bits(name, level),
        (rule and rule.group_size) or group_size,
        generator,
        strict=True,
        cache=cache,
        rounding=level.rounding,
    )


def is_within(name, segments):
    """Whether a module is a segment or part of one.

    Args:
        name (str): Its qualified name.
        segments (Container[str]): Names of segments.
    """
    while name:
        if name in segments:
            return True
        name = name.rpartition('.')[0]
    return '' in segments


def divide_layers(chosen, segments):
    """Divide layers by whether they lie in a segment.

    Args:
        chosen (Sequence): Layers that would be converted without segments.
        segments (Container[str]): Names of segments.

    Returns:
        tuple[list, list]: Layers outside, and those within.
    """
    outside, within = [], []
    for item in chosen:
        part = within if is_within(item.name, segments) else outside
        part.append(item)
    return outside, within


def without_parts(found, segments):
    """Drop fused blocks that lie in segments.

    Args:
        found (FoundFusions): Blocks that would run fused without segments.
        segments (Container[str]): Names of segments.

    Returns:
        FoundFusions: Those outside.
    """
    return type(found)(
        *(
            {
                name: block
                for name, block in blocks.items()
                if not is_within(name, segments)
            }
            for blocks in found
        )
    )
