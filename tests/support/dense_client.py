"""One request straight to one dense group of a live cluster, without an ingress."""

import asyncio

import ray

from remora.cluster.bootstrap import ClusterHandle
from remora.comm.aio import connect_async
from remora.comm.messages import (
    SamplingParams,
    SequenceOutput,
    StepOutputs,
    Submit,
    decode_to_ingress,
    encode,
)
from remora.comm.view import Member

PROMPT = [5, 9, 200, 31, 77, 8, 150]
NUM_TOKENS = 24


def ask_member(handle: ClusterHandle, member: Member) -> SequenceOutput:
    """All of one greedy request to one dense group, as one output."""

    async def ask() -> SequenceOutput:
        host = ray.get_runtime_context().get_node_id()
        connection = await connect_async(member.endpoint, handle.token, host)
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        connection.send(encode(Submit(request_id="r", prompt_ids=PROMPT, params=params)))
        tokens: list[int] = []
        async for payload in connection:
            message = decode_to_ingress(payload)
            assert isinstance(message, StepOutputs)
            [output] = message.outputs
            tokens += output.token_ids
            if output.finish_reason is not None:
                break
        await connection.close()
        return SequenceOutput(
            request_id="r",
            token_ids=tokens,
            finish_reason=output.finish_reason,
            error=output.error,
        )

    return asyncio.run(ask())
