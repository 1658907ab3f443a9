"""What the tests of data share: a fixture, and the way to the helper modules of this folder."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def count_begun_threads() -> Callable[[], int]:
    """Counts the threads that have begun in this test and still run; those of tests before may end at any time."""
    before = set(threading.enumerate())
    return lambda: len(set(threading.enumerate()) - before)
