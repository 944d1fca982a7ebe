import pytest
import torch

from svg.kernels.common import target

if target.INTERPRETED:
    import triton_interpreter

    triton_interpreter.install()


@pytest.fixture(autouse=True)
def poisoned():
    """Fills what torch.empty returns with NaN or the largest integer, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
