from collections.abc import Iterator

import pytest

from tests.e2e.harness import Up


@pytest.fixture(scope="session")
def split() -> Iterator[Up]:
    """Two prefill and two decode workers."""
    up = Up("--prefill=2", "--decode=2")
    yield up
    up.stop()


@pytest.fixture(scope="session")
def colocated() -> Iterator[Up]:
    """One decode worker that prefills for itself."""
    up = Up("--prefill=0")
    yield up
    up.stop()
