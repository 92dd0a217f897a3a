"""The conductor at work: dials every member of the view and carries out what its machine says.

One for a deployment, in the process of dense rank 0, in a thread of its own. It dials the frame
servers that members have anyway; a stream that ends says that its member is gone. Where experts
have no replica without it, it dials again and again, until it is there or a view does without it.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Final

import msgspec

from remora.comm import nccl_conductor_state as machine
from remora.comm.aio import AsyncConnection, connect_async
from remora.comm.errors import ClusterError, DeadlineError
from remora.comm.nccl_api import Nccl
from remora.comm.nccl_messages import (
    Build,
    Commit,
    NotBuilt,
    Refused,
    ToMember,
    Wants,
    decode_to_conductor,
    encode,
)
from remora.comm.nccl_wants_state import WantsState
from remora.comm.view import Member, View

log = logging.getLogger(__name__)

CONDUCTOR_UID: Final = "dense-0"  # whose process it is in
PEER_NAME: Final = "nccl-conductor"  # what members know its streams by
STOP_S: Final = 10.0
LOOK_EVERY_S: Final = 1.0  # whether members that experts are missing without can be reached


class NcclConductor:
    """Gives the members of a deployment's communicator their tickets.

    Args:
        nccl: makes unique ids; this process serves the bootstrap.
        token, self_host: as of `connect_async`.
        capacity_max: rows of a source in the largest step of fixed sizes.
        build_s: for the members to make a communicator.
    """

    def __init__(
        self,
        nccl: Callable[[], Nccl],
        *,
        token: bytes,
        self_host: str,
        capacity_max: int,
        build_s: float,
    ) -> None:
        self._nccl = nccl
        self._token = token
        self._self_host = self_host
        self._build_s = build_s
        self._state = machine.ConductorState()
        self._wants = WantsState(capacity_max)
        self._members: dict[str, Member] = {}
        self._streams: dict[str, AsyncConnection] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._unreached: dict[str, str] = {}  # uid -> why it could not be dialled
        self._why_none: str | None = None  # the view has no communicator, until one begins
        self._refused: Refused | None = None  # nor is there any other: likewise
        self._told: Refused | None = None  # what members heard of that
        self._view: View | None = None
        self._loop = asyncio.new_event_loop()
        self._ending = asyncio.Event()
        self._adopting = asyncio.Lock()
        self._changed = asyncio.Event()  # the machine, or `_why_none`
        self._looking: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name=PEER_NAME, daemon=True)

    def start(self) -> None:
        """Begins; it waits for a view."""
        self._thread.start()

    def adopt(self, view: View) -> None:
        """The newest view, or the same one again after a failure; an older one is ignored. From
        any thread."""
        asyncio.run_coroutine_threadsafe(self._adopt(view), self._loop)

    def wait_for(self, view: View, timeout_s: float, *, or_none: bool) -> None:
        """Returns when all members of `view` that live, or of a newer one, run tickets of one
        communicator. From any other thread, after `adopt`.

        Args:
            or_none: also when they cannot for now.

        Raises:
            ClusterError: they cannot, and why; or not in time.
        """
        used = asyncio.run_coroutine_threadsafe(self._until_used(or_none), self._loop)
        try:
            used.result(timeout_s)
        except TimeoutError:
            used.cancel()
            raise DeadlineError(f"view {view.epoch}: no communicator in {timeout_s:g} s") from None
        except CancelledError:
            raise ClusterError(f"{CONDUCTOR_UID}, which conducts, has stopped") from None

    def close(self) -> None:
        """Ends every stream; members see that. From any thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join(STOP_S)

    # -- its own thread -----------------------------------------------------------------------

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_closed())

    async def _until_closed(self) -> None:
        await self._ending.wait()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _adopt(self, view: View) -> None:
        """Dial who is new, or was lost, then tell the machine: what it sends must reach all."""
        async with self._adopting:
            if self._view is not None and view.epoch < self._view.epoch:
                return
            self._view = view
            try:
                await asyncio.gather(*(self._reach(member) for member in view.members))
                absent = [member.uid for member in view.members if not self._has(member)]
                self._why_none = self._refused = None
                self._handle(machine.ViewCame(view, {uid: self._unreached[uid] for uid in absent}))
            except Exception as error:  # told to whoever waits for a step
                log.exception("view %d is not adopted", view.epoch)
                self._refuse(f"view {view.epoch}: {type(error).__name__}: {error}")

    async def _until_used(self, or_none: bool) -> None:
        async with self._adopting:  # what was told before this was asked
            pass
        while True:
            self._changed.clear()
            if self._why_none is not None:
                if or_none:
                    return
                raise ClusterError(self._why_none)
            if self._state.current is not None and self._state.next is None:
                return
            await self._changed.wait()

    async def _look_again(self) -> None:
        """Until the members that can be reached hold every expert."""
        while self._refused is not None and self._refused.is_hold and self._view is not None:
            await asyncio.sleep(LOOK_EVERY_S)
            await self._adopt(self._view)

    def _has(self, member: Member) -> bool:
        """Whether there is a stream to this life of a member."""
        known = self._members.get(member.uid)
        return known is not None and known.incarnation == member.incarnation

    async def _reach(self, member: Member) -> None:
        """Has a stream to this life of a member, or knows why not."""
        uid = member.uid
        if self._has(member):
            return
        if uid in self._members:
            self._end(uid, f"{uid} has another life")
        try:
            await self._dial(member)
        except ClusterError as error:
            self._unreached[uid] = f"{uid} is gone, or cannot be reached: {error}"

    async def _dial(self, member: Member) -> None:
        stream = await connect_async(
            member.endpoint, self._token, self._self_host,
            name=PEER_NAME, incarnation=member.incarnation,
        )  # fmt: skip
        self._members[member.uid], self._streams[member.uid] = member, stream
        self._tasks[member.uid] = self._loop.create_task(self._listen(member.uid, stream))

    async def _listen(self, uid: str, stream: AsyncConnection) -> None:
        """One member's stream until its end."""
        try:
            async for payload in stream:
                self._receive(payload)
        except (ClusterError, msgspec.DecodeError) as error:
            log.warning("%s is lost: %s", uid, error)
            self._end(uid, f"{uid} is gone: {error}")
        except Exception as error:  # a fault of ours: it is dialled again, like who is lost
            log.exception("the conductor failed on a message of %s", uid)
            self._end(uid, f"the conductor failed on a message of {uid}: {error!r}")
        finally:
            await stream.close()

    def _end(self, uid: str, why: str) -> None:
        """A member is not one any more."""
        member = self._members.pop(uid)
        self._unreached[uid] = why
        del self._streams[uid]
        task = self._tasks.pop(uid)
        if task is not asyncio.current_task():
            task.cancel()
        self._wants.lost(uid)
        self._handle(machine.MemberLost(uid, member.incarnation, why))

    def _receive(self, payload: bytes) -> None:
        message = decode_to_conductor(payload)
        if not isinstance(message, Wants):
            self._handle(message)
            return
        if self._refused is not None:
            self._send(message.uid, self._refused)
        if self._refused is None or self._refused.is_hold:
            self._wants.want(message.uid, message.num_tokens)
            self._begin()

    def _begin(self) -> None:
        wanted = self._wants.begin()
        if wanted is not None:
            self._handle(wanted)

    def _handle(self, event: machine.Event) -> None:
        for instruction in self._state.handle(event):
            match instruction:
                case machine.MakeId(generation):
                    self._why_none = self._refused = self._told = None
                    self._make_id(generation)
                case machine.Send(uids, message):
                    for uid in uids:
                        self._send(uid, message)
                    if isinstance(message, Build):
                        late = machine.BuildLate(message.roster.generation, self._build_s)
                        self._loop.call_later(self._build_s, self._handle, late)
                    if isinstance(message, Commit):
                        self._wants.committed()
                        self._begin()
                case machine.Hold(why):
                    self._refuse(why, is_hold=True)
                case machine.GiveUp(why):
                    self._give_up(why)
        self._changed.set()

    def _make_id(self, generation: int) -> None:
        try:
            unique_id = self._nccl().get_unique_id()
        except Exception as error:  # cupy has others than NcclError
            why = f"NCCL makes no id: {type(error).__name__}: {error}"
            self._handle(NotBuilt(CONDUCTOR_UID, generation, why))
            return
        self._handle(machine.IdMade(generation, unique_id))

    def _give_up(self, why: str) -> None:
        """Who waits for the view's communicator waits in vain; steps do where none is in use."""
        if self._state.current is None:
            self._refuse(why)
            return
        self._why_none = why
        log.error("steps go on over NCCL without some members of the view: %s", why)

    def _refuse(self, why: str, *, is_hold: bool = False) -> None:
        """Whoever waits for a step waits in vain, or longer, until another generation begins."""
        epoch = self._view.epoch if self._view is not None else 0
        self._why_none, self._refused = why, Refused(why, epoch, is_hold)
        self._changed.set()
        if is_hold and (self._looking is None or self._looking.done()):
            self._looking = self._loop.create_task(self._look_again())
        if self._refused == self._told:
            return
        self._told = self._refused
        log.error("no step runs over NCCL: %s", why)
        for uid in list(self._streams):
            self._send(uid, self._refused)

    def _send(self, uid: str, message: ToMember) -> None:
        stream = self._streams.get(uid)
        if stream is None:
            return  # it is gone, which the machine knows
        try:
            stream.send(encode(message))
        except ClusterError as error:
            log.warning("%s cannot be told: %s", uid, error)  # its stream ends: `_listen` tells
