"""How often each named bound was reached; the first time, it is told."""

import sys
import threading
from collections import Counter

_lock = threading.Lock()
_counts: Counter[str] = Counter()


def bit(name: str, told: str) -> None:
    """Count that the bound `name` was reached; `told` says with which value and what to change."""
    with _lock:
        _counts[name] += 1
        first = _counts[name] == 1
    if first:
        print(f"trimtab: {told}", file=sys.stderr)


def counts() -> dict[str, int]:
    """By name, since the process began."""
    with _lock:
        return dict(_counts)
