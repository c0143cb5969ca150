"""What runs in the sandbox around the code under test: names it may use without an import, values that leave as JSON.

Code under test can change all of this; all it gains is another value that it hands out.
"""

_PRELUDE = """
import sys
names = {}
exec('''
from typing import *
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, partial, reduce
from heapq import heapify, heappop, heappush, heapreplace, nlargest, nsmallest
from itertools import accumulate, chain, combinations, groupby, permutations, product
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, sqrt
''', names)
del names["__builtins__"]
"""

RUN_PROGRAM = (
    _PRELUDE
    + """
import runpy
sys.argv = ["solution.py"]
runpy.run_path("solution.py", init_globals=names, run_name="__main__")
"""
)
"""Run solution.py as a program."""

CALL_FUNCTION = (
    _PRELUDE
    + """
import importlib.util, json, os
channel = os.dup(1)
os.dup2(2, 1)
task = json.load(sys.stdin)
sys.path.insert(0, os.getcwd())
spec = importlib.util.spec_from_file_location("solution", "solution.py")
solution = sys.modules["solution"] = importlib.util.module_from_spec(spec)
vars(solution).update(names)
spec.loader.exec_module(solution)


def plain(value):
    # as JSON knows it; what it does not know is left for json.dump to refuse
    kind = type(value)
    if kind.__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {name(key): plain(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset, type({}.keys()))):
        try:
            return [plain(one) for one in sorted(value)]
        except TypeError:
            return sorted(map(plain, value), key=repr)
    if isinstance(value, (list, tuple)) or kind.__module__ in ("builtins", "collections", "itertools") and (
        hasattr(value, "__iter__") and not isinstance(value, (str, bytes, bytearray))
    ):
        return [plain(one) for one in value]
    if kind.__module__ in ("decimal", "fractions", "_decimal"):
        return int(value) if value == int(value) else float(value)
    return value


def name(key):
    key = plain(key)
    return key if key is None or isinstance(key, (str, int, float, bool)) else str(key)


first, *rest = task["call"].split(".")
function = getattr(solution, first)
for part in rest:
    function = getattr(function() if isinstance(function, type) else function, part)
value = plain(function(*task["arguments"]))
with open(channel, "w") as out:
    json.dump(value, out)
"""
)
"""Call a function of solution.py: {"call", "arguments"} comes from stdin, the value leaves as JSON on a copy of stdout,
and what the code prints goes to stderr."""
