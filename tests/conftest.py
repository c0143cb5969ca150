import os
import shutil
import subprocess

import pytest
import torch
from hypothesis import settings

from trimtab.rewards.sandbox import accept_limits_only

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU

settings.register_profile("trimtab", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("trimtab")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what is marked slow: it takes minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; left out unless --slow is given")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --slow"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    accept_limits_only()  # a machine without namespaces runs the tests too; a run that a test prepared asked for more


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True)
    if not done or done.returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
