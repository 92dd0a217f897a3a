"""A dense group's reports to the router: a thread beside the engine, off the hot path.

A router that is gone costs nothing but statistics: the thread looks for it again, at most once a
period, and what was counted meanwhile stays where it was counted, bounded.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import grpc
import numpy as np
from numpy.typing import NDArray

import remora.comm.router_pb2 as router_pb2
from remora.actors.launch import Launch
from remora.actors.load_sharing import NOTHING, LoadSharing
from remora.actors.router_lookup import router_address
from remora.comm.grpc_base import channel_options, unary_call
from remora.comm.messages import EngineStats
from remora.comm.router_grpc import REPORT, credentials_of

logger = logging.getLogger(__name__)

CALL_S: Final = 5.0
PERIOD_MAX_S: Final = 60.0


class RouterReporter:
    """Sends a report every few seconds until `close`.

    Args:
        launch: who reports, to the router of which deployment.
        period_s: until the router says otherwise.
        stats: gauges now.
        take_sketch: what was routed since it was last asked, encoded; empty when nothing was.
        loads: what was sent to which shard; what others sent is noted there.
        find: the router's address by deployment, or None while there is none; asked again after a
            failure.
    """

    def __init__(
        self,
        launch: Launch,
        period_s: float,
        stats: Callable[[], EngineStats],
        take_sketch: Callable[[], bytes],
        loads: LoadSharing,
        find: Callable[[str], str | None] = router_address,
    ) -> None:
        self._launch = launch
        self._credentials = credentials_of(launch.token)
        self._find, self._stats, self._take_sketch = find, stats, take_sketch
        self._loads = loads
        self._period_s = period_s
        self._channel: Any = None
        self._call: Any = None
        self._is_lost = False
        self._closing = threading.Event()
        self.reports = 0  # that arrived
        self._thread = threading.Thread(target=self._run, name="remora-reporter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reporting; returns when the thread has ended."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._period_s):
            if self._call is None and not self._connect():
                continue
            self._report()
        self._disconnect()

    def _connect(self) -> bool:
        address = self._find(self._launch.deployment)
        if address is None:
            return False
        self._channel = grpc.insecure_channel(address, options=channel_options())
        self._call = unary_call(self._channel, REPORT)
        return True

    def _report(self) -> None:
        stats = self._stats()
        epoch, sent_LS = self._loads.take()
        request = router_pb2.ReportRequest(
            group=self._launch.uid,
            incarnation=self._launch.incarnation,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks_total=stats.kv_blocks_total,
            sketch=self._take_sketch(),
            epoch=epoch,
            sent=[router_pb2.ShardPairs(pairs=sent_S) for sent_S in sent_LS.tolist()],
        )
        try:
            answer = self._call(request, timeout=CALL_S, metadata=self._credentials)
        except grpc.RpcError as error:
            if not self._is_lost:
                logger.warning("the router does not take reports: %s", error)
            self._is_lost = True
            self._loads.note(epoch, None)
            self._disconnect()
            return
        self._is_lost = False
        if epoch != NOTHING[0]:
            self._loads.note(epoch, _others(answer, sent_LS))
        self.reports += 1
        if answer.report_after_s > 0:
            self._period_s = min(answer.report_after_s, PERIOD_MAX_S)

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = self._call = None


def _others(answer: Any, sent_LS: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """`[L, S]` of an answer; None where the router does not know, or counts other shards."""
    rows = [list(layer.pairs) for layer in answer.others_sent]
    if [len(row) for row in rows] != [sent_LS.shape[1]] * sent_LS.shape[0]:
        return None
    return np.array(rows, np.int64)


def report_to_router(
    launch: Launch,
    stats: Callable[[], EngineStats],
    take_sketch: Callable[[], bytes],
    loads: LoadSharing,
) -> RouterReporter | None:
    """A reporter, where the deployment has a router."""
    if launch.report_every_s is None:
        return None
    return RouterReporter(launch, launch.report_every_s, stats, take_sketch, loads)
