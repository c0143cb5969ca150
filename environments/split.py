"""The held-out split: a property of a task's text, not of the order in which tasks are drawn."""

import hashlib


def is_held_out(identity: str) -> bool:
    """True for one identity in five, the same on every machine and in every run.

    identity is what a policy could memorise of a task, usually its prompt without formatting instructions.
    """
    return hashlib.sha256(identity.encode()).digest()[0] * 5 < 256
