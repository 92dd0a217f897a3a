"""A load for one dense group, straight to its control stream: what an ingress does, without one."""

import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from remora.actors.launch import host_label
from remora.cluster.bootstrap import ClusterHandle
from remora.comm.aio import AsyncConnection, connect_async
from remora.comm.errors import ClusterError
from remora.comm.messages import (
    SamplingParams,
    StepOutputs,
    Submit,
    decode_to_ingress,
    encode,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One batch from its submission on, seconds."""

    seconds: float  # until the last token
    first_s: float  # until every sequence had its first token
    num_tokens: int
    gaps_s: tuple[float, ...]  # between messages of the engine, one a step, once all have begun


class EngineLoad:
    """One control stream; `connect` makes it. One batch at a time."""

    def __init__(self, link: AsyncConnection) -> None:
        self._link = link
        self._payloads: AsyncIterator[bytes] = aiter(link)
        self._names = (f"bench-{secrets.token_hex(4)}-{n}" for n in itertools.count())

    @classmethod
    async def connect(cls, handle: ClusterHandle, *, group: int = 0) -> "EngineLoad":
        """To dense group number `group` of a deployment. Raises PeerLostError, AuthError."""
        member = handle.dense_members()[group]
        link = await connect_async(
            member.endpoint,
            handle.token,
            host_label(),
            name="benchmark",
            incarnation=member.incarnation,
        )
        return cls(link)

    async def close(self) -> None:
        """Closes the stream."""
        await self._link.close()

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_new: int,
        on_first: Callable[[], Awaitable[None]] | None = None,
    ) -> Timing:
        """Submits every prompt at once, greedy; returns when each has its `num_new` tokens.

        Args:
            on_first: awaited, beside the stream, when every sequence has its first token.

        Raises:
            ClusterError: with what the engine said of a request that failed.
        """
        params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
        submits = [
            encode(Submit(request_id=name, prompt_ids=list(ids), params=params))
            for name, ids in zip(self._names, prompts, strict=False)
        ]
        begin = time.perf_counter()
        for data in submits:
            self._link.send(data)
        begun, running, num_tokens, first_s = set[str](), len(prompts), 0, 0.0
        arrivals_s: list[float] = []
        while running:
            message = decode_to_ingress(await anext(self._payloads))
            if first_s:
                arrivals_s.append(time.perf_counter())
            assert isinstance(message, StepOutputs), message
            for output in message.outputs:
                if output.error is not None:
                    raise ClusterError(f"{output.request_id}: {output.error}")
                num_tokens += len(output.token_ids)
                running -= output.finish_reason is not None
                begun.add(output.request_id)
            if not first_s and len(begun) == len(prompts):
                first_s = time.perf_counter() - begin
                if on_first is not None:
                    await on_first()
        seconds = time.perf_counter() - begin
        gaps_s = tuple(b - a for a, b in itertools.pairwise(arrivals_s))
        return Timing(seconds=seconds, first_s=first_s, num_tokens=num_tokens, gaps_s=gaps_s)
