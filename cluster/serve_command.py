"""`remora serve`: bring everything up, say it is ready, wait for a signal, take it down."""

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

import ray
from ray import serve
from ray.serve.context import _get_global_client
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from remora.actors.launch import Progress as Loading
from remora.actors.tokenizer import Tokenizer
from remora.cluster.app import application
from remora.cluster.bootstrap import (
    ensure_cluster,
    find_cluster,
    is_up,
    neutral_runtime_env,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig
from remora.cluster.elastic import log_folder
from remora.cluster.instances import TOKEN_ENV, Instance, write_down, written_down
from remora.cluster.local_ray import check_free, own_ray, proxy_port, quiet_ray
from remora.cluster.model_source import local_checkpoint
from remora.cluster.ray_address import connect
from remora.cluster.security import ADMIN_KEYS_ENV, API_KEYS_ENV, load_keys
from remora.cluster.wal import forget
from remora.comm.errors import ClusterError, ConfigError

KEYS_FILES = {API_KEYS_ENV: "http.api_keys_file", ADMIN_KEYS_ENV: "http.admin_keys_file"}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_serve(config: RemoraConfig, *, as_json: bool) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; what this command brought up is taken down again.

    Raises:
        RemoraError: it cannot be served; nothing is left behind.
    """
    config = config.model_copy(update={"model": local_checkpoint(config.model)})
    _check_ingress(config)
    console = Console(stderr=True)
    with ExitStack() as stack:
        try:
            _install_signals()
            url = _bring_up(config, stack, console)
            _announce(config, url, as_json)
            threading.Event().wait()
        except KeyboardInterrupt:
            if not as_json:
                console.print("stopping ...")
        finally:
            _ignore_signals()  # a second Ctrl-C must not leave half of it behind
    return 0


def _check_ingress(config: RemoraConfig) -> None:
    """What an ingress needs is there: Serve would start it again and again to find out.

    Raises:
        RemoraError: a keys file or the tokenizer cannot be used, or keys would not reach it.
    """
    for variable, key in KEYS_FILES.items():
        if config.ray.address is not None and variable in os.environ:
            raise ConfigError(
                f"${variable}: the ingress runs in the Ray cluster at {config.ray.address}, which"
                f" has another environment: name a file ({key}), and unset it here"
            )
    load_keys(config.http.api_keys_file, API_KEYS_ENV)
    load_keys(config.http.admin_keys_file, ADMIN_KEYS_ENV)
    Tokenizer(config.model)


def _bring_up(config: RemoraConfig, stack: ExitStack, console: Console) -> str:
    """Start Ray or connect to it, the data plane, Serve. Returns the base URL."""
    own = config.ray.address is None
    session, adopted = None, False
    if own:
        config = check_free(config)
        after_ray = stack.enter_context(ExitStack())
        address, session = stack.enter_context(own_ray(config))
        after_ray.callback(_forget_log, config, log_folder(config))
    else:
        address = str(config.ray.address)
        quiet_ray()
        connect(address, runtime_env=neutral_runtime_env())
        stack.callback(ray.shutdown)
        adopted = is_up(config.name)
    _install_signals()  # ray.init has put its own in place
    if adopted:
        _adopt(config, address, console)
    else:
        stack.enter_context(written_down(_instance(config, address, session)))
        if not own:  # a Ray cluster of our own ends with everything that is in it
            stack.callback(_stop_data_plane, config.name)
        with _progress(console) as report:
            ensure_cluster(config, report)
    url = _start_serve(config, own, stack, console)
    if not adopted:
        write_down(replace(_instance(config, address, session), url=url))
    return url


def _instance(config: RemoraConfig, address: str, session: str | None) -> Instance:
    return Instance(
        name=config.name,
        pid=os.getpid(),
        ray_address=address,
        ray_token=os.environ[TOKEN_ENV] if config.ray.address is None else None,
        url=None,
        model=config.model_id,
        session=session,
    )


def _adopt(config: RemoraConfig, address: str, console: Console) -> None:
    """Take part in a deployment that somebody else has started, and will end.

    Raises:
        ConfigError: it serves something else; it goes on.
    """
    console.print(
        f"adopting the deployment {config.name!r} that runs in {address}; it goes on after this"
        f" command (remora stop {config.name} --ray-address {address} ends it)"
    )
    with _progress(console) as report:
        ensure_cluster(config, report)


def _start_serve(config: RemoraConfig, own: bool, stack: ExitStack, console: Console) -> str:
    http = config.http
    port = proxy_port(config) if own else http.port
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": http.host, "port": port},  # ignored where Serve runs already
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    url, prefix = f"http://{_for_url(http.host)}:{http.port}", "/"
    if not own:
        client = _get_global_client()
        assert client is not None, "Serve was started above"
        url = str(client.root_url)
        applications = set(serve.status().applications)
        if applications - {config.name}:
            prefix = f"/{config.name}"
        console.print(f"sharing the Serve instance at {url}, under {prefix}")
        if config.name not in applications:  # else somebody else's, which this one only upgrades
            stack.callback(_delete_app, config.name)
    try:
        serve.run(
            application(config),
            name=config.name,
            route_prefix=prefix,
            logging_config={"log_level": "WARNING"},  # and `http.access_log`
        )
    except RuntimeError as error:  # Serve's own, after several attempts
        raise ClusterError(f"the ingress does not start: {_why_not(config.name)}") from error
    return url.rstrip("/") + prefix.rstrip("/")


def _why_not(name: str) -> str:
    """What Serve says of an application that failed: its replicas' own words come last."""
    found = serve.status().applications.get(name)
    if found is None:
        return "Serve does not know it"
    messages = [found.message, *(d.message for d in found.deployments.values())]
    lines = [line for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1].strip() if lines else str(found.status)


def _forget_log(config: RemoraConfig, folder: Path) -> None:
    """The coordinator ended with our own Ray cluster, before it could: nobody will read its log."""
    forget(folder)
    if config.elastic.log_dir is None:
        with suppress(OSError):  # the autoscaler's decisions stay, for `remora autoscale replay`
            folder.parent.rmdir()


def _delete_app(name: str) -> None:
    try:
        serve.delete(name)
    except (ray.exceptions.RayError, RuntimeError) as error:
        print(f"remora: Serve did not delete {name}: {error}", file=sys.stderr)


def _stop_data_plane(name: str) -> None:
    try:
        if find_cluster(name) is not None:
            stop_cluster(name)
    except (ClusterError, ray.exceptions.RayError) as error:
        print(f"remora: the data plane did not stop by itself: {error}", file=sys.stderr)


def _announce(config: RemoraConfig, url: str, as_json: bool) -> None:
    if as_json:
        fields = {
            "event": "ready",
            "name": config.name,
            "url": f"{url}/v1",
            "model": config.model_id,
            "numerics": config.numerics,
            "dense_groups": config.dense.groups,
            "expert_shards": config.experts.shards,
        }
        print(json.dumps(fields), flush=True)
        return
    body = {
        "model": config.model_id,
        "messages": [{"role": "user", "content": "Tell me about the sea."}],
        "max_tokens": 64,
        "stream": True,
    }
    is_open = load_keys(config.http.api_keys_file, API_KEYS_ENV).is_open
    key = "" if is_open else " -H 'Authorization: Bearer <key>'"
    print(
        f"\nRemora serves {config.model_id} at {url}/v1 ({config.numerics} numerics,"
        f" {config.dense.groups} dense group(s), {config.experts.shards} expert shard(s)). Try:\n\n"
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f"    -d {shlex.quote(json.dumps(body))}\n\nCtrl-C stops what this command started.",
        flush=True,
    )


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[dict[str, Loading]], None]]:
    """A progress bar for each process that loads; nothing where there is no terminal."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), DownloadColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(loading: dict[str, Loading]) -> None:
            for uid, state in sorted(loading.items()):
                if uid not in tasks:
                    tasks[uid] = progress.add_task(uid, total=None)
                progress.update(
                    tasks[uid],
                    description=f"{uid} {state.phase}",
                    completed=state.bytes_done,
                    total=state.bytes_total or None,
                )

        yield report


def _raise_stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # what Ray's own waiting lets through; any other one it mangles


def _install_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, _raise_stop)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _for_url(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
