"""A whole ingress over fake engines: for an ASGI client in process, or on a real port."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from support.fake_engine import HOST, TOKEN, FakeEngine

from remora.actors.tokenizer import Tokenizer
from remora.cluster.config import RemoraConfig, parse_config
from remora.cluster.engine_client import EngineClient
from remora.cluster.ingress import build_app
from remora.cluster.request_plan import ModelInfo
from remora.cluster.service import Service, make_service
from remora.comm.view import Member

DEMO_MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo-model"
STORY = (
    "Once upon a time a remora met a whale. \N{GRINNING FACE} They swam past caf\u00e9 \u65e5\u672c"
    " and back, and the whale said: stop here. Then they slept."
)
MODEL = "demo"
MAX_MODEL_LEN = 256

_tokenizer: list[Tokenizer] = []


def demo_tokenizer() -> Tokenizer:
    """The demo model's tokenizer, loaded once."""
    if not _tokenizer:
        _tokenizer.append(Tokenizer(DEMO_MODEL))
    return _tokenizer[0]


def make_engine(**options: Any) -> FakeEngine:
    """An engine that tells `STORY`."""
    tokenizer = demo_tokenizer()
    return FakeEngine(
        tokenizer.encode(STORY),
        eos_id=0,
        vocab_size=tokenizer.vocab_size,
        **{"max_model_len": MAX_MODEL_LEN, **options},
    )


def make_config(**http: Any) -> RemoraConfig:
    """A configuration of the test ingress."""
    data = {"model": str(DEMO_MODEL), "served_model_name": MODEL, "http": http}
    return parse_config(data)


@asynccontextmanager
async def running_service(
    *engines: FakeEngine, hold_s: float = 0.0, **http: Any
) -> AsyncIterator[Service]:
    """A connected service on the running loop; `hold_s` as `EngineClient`."""

    async def members() -> list[Member]:
        return [engine.member() for engine in engines]

    tokenizer = demo_tokenizer()
    client = EngineClient(members, token=TOKEN, self_host=HOST, hold_s=hold_s)
    await client.start()
    info = ModelInfo(
        id=MODEL,
        root=str(DEMO_MODEL),
        created_unix_s=1_700_000_000,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=tokenizer.vocab_size,
        fingerprint="fp_test",
    )
    service = make_service(make_config(**http), model=info, tokenizer=tokenizer, engine=client)
    try:
        yield service
    finally:
        await service.close()


class Server:
    """A real uvicorn on a port of its own, in a thread."""

    def __init__(self, engines: tuple[FakeEngine, ...], http: dict[str, Any]) -> None:
        self._engines = engines
        self._http = http
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self.service: Service | None = None
        self.app: FastAPI | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="test-ingress", daemon=True)

    def start(self) -> None:
        """Serve; returns once the port answers."""
        self._thread.start()
        assert self._ready.wait(30), "the ingress did not start"
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Stop serving and join."""
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the ingress did not stop"
        self._socket.close()

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as failure:  # handed to the test by `start`
            self._failure = failure
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with running_service(*self._engines, **self._http) as service:
            self.service = service
            self.app = build_app(service)
            config = uvicorn.Config(
                self.app, log_level="warning", access_log=False, lifespan="off", ws="none"
            )
            server = uvicorn.Server(config)
            config.load()
            server.lifespan = config.lifespan_class(config)
            await server.startup(sockets=[self._socket])
            self._ready.set()
            main = asyncio.ensure_future(server.main_loop())
            await self._stop.wait()
            server.should_exit = True
            await main
            await server.shutdown(sockets=[self._socket])


@contextmanager
def serving(*engines: FakeEngine, **http: Any) -> Iterator[Server]:
    """A real HTTP server over engines that run."""
    server = Server(engines, http)
    server.start()
    try:
        yield server
    finally:
        server.stop()
