"""A coordinator without Ray that comes back to what another one has left."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.router_rig import view_of

from remora.cluster import coordinator as module
from remora.cluster.beside import Beside
from remora.cluster.config import RemoraConfig, load_config
from remora.cluster.coordinator import Coordinator
from remora.cluster.elastic import Elastic
from remora.cluster.wal import FILE, Wal, decode_records
from remora.comm.errors import WeightsError
from remora.comm.view import View

NAME = "lives"
SOON_S = 20.0


class Lives:
    """A coordinator's surroundings, without Ray: who lives, and whether its model can be read."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        overrides = {
            "name": NAME,
            "model": "/nowhere/model",
            "router.enabled": False,
            "elastic.log_dir": str(folder),
        }
        self.config: RemoraConfig = load_config(None, overrides=overrides)
        self.folder = folder / NAME
        self.is_again = True
        self.living: View | None = view_of()
        self.is_readable = True
        self.why: Exception = WeightsError("it is not there")
        self.swept: list[list[dict[str, Any]]] = []  # what the log held when all was ended
        self.deployed = threading.Event()
        monkeypatch.setattr(module, "is_next_life", lambda: self.is_again)
        monkeypatch.setattr(module, "inspect_model", self.inspect)
        monkeypatch.setattr(module, "end_all", self.sweep)
        monkeypatch.setattr(module, "LOCK_S", 0.05)
        monkeypatch.setattr(module, "ADOPT_EVERY_S", 0.05)
        monkeypatch.setattr(Elastic, "resume", lambda operations, *_: self.resumed(operations))
        monkeypatch.setattr(Beside, "listen", lambda _: None)

    def write(self, *records: dict[str, Any]) -> None:
        wal, _ = Wal.open(self.folder)
        for record in records:
            wal.append(record)
        wal.close()

    def made(self) -> Coordinator:
        return Coordinator(self.config.model_dump(mode="json"), b"x" * 32)

    def resumed(self, operations: Elastic) -> View | None:
        if self.living is not None:
            operations._publish(self.living)
        return self.living

    def inspect(self, _: str) -> None:
        if not self.is_readable:
            raise self.why

    def sweep(self, _: str) -> None:
        log = self.folder / FILE
        self.swept.append(decode_records(log.read_bytes(), log)[0] if log.exists() else [])


def until(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(int(SOON_S / 0.02)):
        if condition():
            return
        done.wait(0.02)
    raise AssertionError("not within the time")
