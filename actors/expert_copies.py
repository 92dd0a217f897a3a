"""Experts from shard to shard: what a shard gives of its memory, and how another one takes it.

The giving side has a listener and a thread of its own, at idle priority: a copy is never between a
call and its rows. The taking side writes into a free slot; whoever calls checks the digest.
"""

import logging
import threading
from collections.abc import Sequence
from typing import Final

from remora.actors.copy_pace import Pace
from remora.actors.launch import Launch, ReplicaSource, advertised_ip, host_label
from remora.actors.shard_model import ShardExperts
from remora.actors.thread_policy import go_idle
from remora.comm.copies import CopyRefusedError, CopyService, CopySource, Part, pieces
from remora.comm.errors import ClusterError
from remora.comm.server import FrameServer, ServerLimits
from remora.comm.view import Endpoint

logger = logging.getLogger(__name__)

Pair = tuple[int, int]  # decoder layer, logical expert
READERS_MAX: Final = 64  # connections of other shards


class CopyGiver:
    """Gives what a shard holds to others; its own thread."""

    def __init__(self, shard: ShardExperts, launch: Launch) -> None:
        self._shard = shard
        self._name = f"remora-{launch.uid}-copies"
        self.service = CopyService(self._read)
        self._server = FrameServer(
            host_ip=launch.bind_ip,
            token=launch.token,
            on_frame=self.service.on_frame,
            unix=launch.use_unix,
            incarnation=launch.incarnation,
            advertise_ip=advertised_ip(launch.bind_ip),
            limits=ServerLimits(connections_max=READERS_MAX),
        )
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> Endpoint:
        """Where others dial."""
        return self._server.endpoint(host_label())

    def close(self) -> None:
        """Stop, and close every socket."""
        self._server.stop()
        self._thread.join()

    def _run(self) -> None:
        go_idle(self._name)
        self._server.run()

    def _read(self, part: Part) -> list[memoryview]:
        found = self._shard.held_memory(part.layer, part.expert)
        if found is None:
            raise CopyRefusedError(f"layer {part.layer} expert {part.expert} is not held")
        layout, memory = found
        if layout != part.layout:
            raise CopyRefusedError(f"held as {layout}, not as {part.layout}")
        asked = pieces(memory, part.offset, part.size_bytes)
        if sum(map(len, asked)) != part.size_bytes:
            raise CopyRefusedError(f"{part} is beyond what is held")
        return asked


class CopyTaker:
    """Copies experts from several sources; one thread. Close it."""

    def __init__(self, sources: Sequence[ReplicaSource], launch: Launch) -> None:
        self._sources = {source.uid: source for source in sources}
        self._launch = launch
        self._open: dict[str, CopySource] = {}

    def take(
        self, uid: str, pair: Pair, pace: Pace, layout: str, memory: Sequence[memoryview]
    ) -> bool:
        """Write an expert's bytes into `memory`; False: this source does not give it.

        A source that is lost is asked no more.
        """
        if uid not in self._sources:
            return False
        try:
            if uid not in self._open:
                self._open[uid] = self._connect(self._sources[uid])
            self._open[uid].read_into(*pair, layout, memory, pace.take)
        except CopyRefusedError as refused:
            logger.warning("%s does not give layer %d expert %d: %s", uid, *pair, refused)
            return False
        except ClusterError as lost:
            logger.warning("%s is no source of copies any more: %s", uid, lost)
            del self._sources[uid]
            self._drop(uid)
            return False
        return True

    def close(self) -> None:
        """Close every connection."""
        for uid in list(self._open):
            self._drop(uid)

    def _drop(self, uid: str) -> None:
        source = self._open.pop(uid, None)
        if source is not None:
            source.close()

    def _connect(self, source: ReplicaSource) -> CopySource:
        launch = self._launch
        return CopySource(
            source.endpoint, launch.token, host_label(), launch.uid, source.incarnation
        )
