import os

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
