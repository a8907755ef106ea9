"""Levels of a command line."""

import json


def read_level(text):
    """What :func:`mmactnn.get_level` takes, from a text.

    The text is the name of a level (``L3``), or a name and what differs from
    it as json (``L3:{"conv": 4}``).
    """
    base, colon, changes = text.partition(':')
    return {**dict(json.loads(changes)), 'base': base} if colon else base
