"""Shared by all tests: the same random numbers in every run, and no look at a model hub."""

import os
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def seeded():
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
