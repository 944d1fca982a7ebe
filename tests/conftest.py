"""Shared by all tests: the same random numbers in every run, and no look at a model hub."""

import os
import signal
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell that starts pytest in the background makes it and its children ignore SIGINT, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
