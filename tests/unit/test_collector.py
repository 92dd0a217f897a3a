"""What a start leaves behind: garbage of it is freed, what stays is never looked at again."""

import gc
import weakref

import pytest
import ray

from remora.actors.collector import objects_that_stay


class Node:
    """Part of a cycle."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_of_a_start_is_freed_and_what_stays_is_frozen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    kept: list[Node] = []
    frozen = gc.get_freeze_count()
    try:
        with objects_that_stay():
            kept.append(Node())
            dropped = weakref.ref(Node())
            assert not gc.isenabled(), "a pass would stop whoever shares the cores"
            with objects_that_stay():
                pass  # an actor inside its process
        assert dropped() is None and gc.isenabled()
        assert gc.get_freeze_count() > frozen
        assert not any(kept[0] is x for x in gc.get_objects()), "a pass would look at it"
    finally:
        gc.unfreeze()


def test_outside_a_ray_worker_nothing_changes() -> None:
    frozen = gc.get_freeze_count()
    with objects_that_stay():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
