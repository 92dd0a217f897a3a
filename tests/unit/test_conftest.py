"""The guard of tests/conftest.py works on the ways by which Ray starts."""

import pytest
import ray


def test_no_cluster_by_accident() -> None:
    with pytest.raises(AssertionError, match="not marked live"):
        ray.init()
    with pytest.raises(AssertionError, match="not marked live"):
        ray.put(1)
