"""What HTTP streaming costs a token: CPU of the ingress process over the tokens it streamed.

The real application on a real port in a process of its own, fed by a dense group without a model
(the real state machine and socket, so the frames are real), read by 32 raw connections. Wall time
would say how fast the machine is when four processes share it; CPU time says what a token costs.

    python benchmarks/http_overhead.py [--quick]

Prints one JSON line; the bar of the issue is `cpu_us_per_token` < 200 at 32 streams.
"""

import argparse
import json
import multiprocessing
import resource
import selectors
import socket
import sys
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.serving import MAX_MODEL_LEN, make_engine, serving

PACE_S = 0.005  # of a step: 32 tokens every 5 ms, about what a small model does


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--streams", type=int, default=32)
    options = parser.parse_args()
    rounds = 2 if options.quick else 8
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    ingress = context.Process(target=_ingress, args=(theirs,))
    ingress.start()
    address = ours.recv()
    results = []
    for kind in ("completions", "chat/completions"):
        _load(address, kind, options.streams, 1)  # warm
        ours.send("cpu")
        before = ours.recv()
        tokens = _load(address, kind, options.streams, rounds)
        ours.send("cpu")
        results.append((kind, tokens, ours.recv() - before))
    ours.send("stop")
    ingress.join()
    fields = {"streams": options.streams}
    fields |= {
        f"{kind.partition('/')[0]}_cpu_us_per_token": round(1e6 * cpu_s / tokens, 1)
        for kind, tokens, cpu_s in results
    }
    print(json.dumps(fields))


def _ingress(pipe: Connection) -> None:
    engine_context = multiprocessing.get_context("spawn")
    engine_pipe, child = engine_context.Pipe()
    engine = engine_context.Process(target=_engine, args=(child,))
    engine.start()
    member = engine_pipe.recv()

    class Remote:
        """Stands for the engine in the other process: all an ingress needs is its address."""

        def member(self) -> object:
            return member

    with serving(Remote(), queue_max=4096) as server:  # type: ignore[arg-type]
        pipe.send(server.url.removeprefix("http://"))
        while pipe.recv() == "cpu":
            usage = resource.getrusage(resource.RUSAGE_SELF)
            pipe.send(usage.ru_utime + usage.ru_stime)
    engine_pipe.send("stop")
    engine.join()


def _engine(pipe: Connection) -> None:
    with make_engine(pace_s=PACE_S) as engine:
        pipe.send(engine.member())
        pipe.recv()


def _load(address: str, kind: str, streams: int, rounds: int) -> int:
    """Tokens streamed; every connection reads until `[DONE]`, then asks again."""
    host, port = address.split(":")
    num_tokens = MAX_MODEL_LEN - 32
    body: dict[str, object] = {"max_tokens": num_tokens, "stream": True, "ignore_eos": True}
    if kind == "completions":
        body["prompt"] = "The whale"
    else:
        body["messages"] = [{"role": "user", "content": "hi"}]
    data = json.dumps(body).encode()
    request = (
        f"POST /v1/{kind} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    ).encode() + data
    selector = selectors.DefaultSelector()
    for _ in range(streams):
        sock = socket.create_connection((host, int(port)))
        sock.sendall(request)
        selector.register(sock, selectors.EVENT_READ, [rounds])
    running = streams
    while running:
        for key, _ in selector.select():
            sock = key.fileobj  # type: ignore[assignment]
            if b"[DONE]" in sock.recv(1 << 16):
                key.data[0] -= 1
                if key.data[0]:
                    sock.sendall(request)
                else:
                    selector.unregister(sock)
                    sock.close()
                    running -= 1
    return streams * rounds * num_tokens


if __name__ == "__main__":
    main()
