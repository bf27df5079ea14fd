"""One thread, whose sums have one order; the scripts are imported from the folder above."""
import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ["OMP_NUM_THREADS"] = "1"    # of scripts that tests start: same bits as in this process
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than about five seconds")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
