"""The coordinator's log in the simulator: records on a virtual disk."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from remora.cluster.wal import WalError, decode_records, encode_record

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment


class SimCrash(BaseException):
    """The coordinator's process is gone at this point; no handler of its code sees that."""


class SimLog:
    """The log on a disk that may be full, or lose the end of a write with the process."""

    def __init__(self, world: "Deployment") -> None:
        self._world = world
        self._data = b""

    @property
    def num_bytes(self) -> int:
        """Bytes that are durable."""
        return len(self._data)

    @num_bytes.setter
    def num_bytes(self, _: int) -> None:
        raise AssertionError("the log's size is what was written")

    @property
    def is_broken(self) -> bool:
        """As `Wal.is_broken`."""
        return False

    def append(self, record: dict[str, Any]) -> None:
        """As `Wal.append`."""
        world = self._world
        world.coordinator.before_effect()
        frame = encode_record(record)
        if world.faults.log_tears:
            world.faults.log_tears = False
            self._data += frame[: world.chance.randrange(len(frame))]
            world.trace(f"the coordinator dies while it writes {record['t']}")
            raise SimCrash
        if world.clock.now_s < world.faults.disk_full_until_s:
            world.trace(f"disk full: {record['t']} is not written")
            raise WalError("log: no space left on device")
        self._data += frame
        world.trace(f"log {record['t']}")
        world.coordinator.after_effect()

    def replace(self, record: dict[str, Any]) -> None:
        """As `Wal.replace`."""
        self._data = encode_record(record)

    def read(self) -> list[dict[str, Any]]:
        """As `Wal.open`: a torn end goes."""
        records, end = decode_records(self._data, Path("log"))
        self._data = self._data[:end]
        return records
