"""A short soak: every fault that benchmarks/soak.py puts in has its outcome, nothing is lost. Run by `make soak`."""

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent.parent / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_soak_loses_nothing():
    done = subprocess.run([sys.executable, SOAK, "--steps", "120"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "prompts lost 0, doubled 0; faults inside that no reason tells of 0" in done.stdout
