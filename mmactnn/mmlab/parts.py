"""Parts of a config."""

from collections.abc import Iterator


def parts_of(config) -> Iterator[dict]:
    """Yield every dict of a nested config, the outer ones first.

    Args:
        config (dict | list | Any): The config, or a part of it.

    Yields:
        dict: The dicts, which may be changed.
    """
    if isinstance(config, dict):
        yield config
        config = config.values()
    elif not isinstance(config, (list, tuple)):
        return
    for part in config:
        yield from parts_of(part)
