"""A fixture: the directory of a tiny random Wan pipeline, saved once a session."""

import pytest
from tiny_pipelines import saver


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Directory of a tiny Wan pipeline."""
    return saver(tmp_path_factory.mktemp("models"))("wan")
