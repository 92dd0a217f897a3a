"""A Ray cluster on this machine whose autoscaler starts and ends nodes, beside any others.

Ray's own `AutoscalingCluster` ends every Ray process of the machine when it starts, and reads a
file that its wheel does not have; its provider of pretended nodes (raylets as processes) is used.
"""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.cluster_utils import Cluster

from remora.actors.launch import RAY_NAMESPACE
from remora.cluster.bootstrap import neutral_runtime_env

LISTS = (
    "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands",
    "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
    "worker_start_ray_commands",
)  # fmt: skip


@contextlib.contextmanager
def autoscaled_ray(
    folder: Path,
    *,
    head: dict[str, Any],
    node_types: dict[str, dict[str, Any]],
    idle_s: float,
) -> Iterator[Cluster]:
    """A head, and nodes of `node_types` as they are asked for; connected.

    Args:
        head: its `resources` and `labels`.
        node_types: as `available_node_types` of a cluster configuration of Ray's autoscaler.
        idle_s: then a node on which nothing is asked for is ended.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_enable_autoscaler_v2": "1",
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }.items():
            patch.setenv(name, value)
        own = {
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
        }
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": head["resources"]["CPU"], "labels": head["labels"], "env_vars": own,
                "no_monitor": True, "include_dashboard": False, "dashboard_port": None,
            },
        )  # fmt: skip
        session = cluster.head_node.get_session_dir_path()
        try:
            path = folder / "autoscaling.json"
            path.write_text(json.dumps(_config(cluster.address, head, node_types, idle_s)))
            cluster.head_node._ray_params.autoscaling_config = str(path)
            cluster.head_node.start_monitor()
            environment = neutral_runtime_env()
            ray.init(address=cluster.address, namespace=RAY_NAMESPACE, runtime_env=environment)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            _end_processes_of(session)


def _config(
    address: str, head: dict[str, Any], node_types: dict[str, dict[str, Any]], idle_s: float
) -> dict[str, Any]:
    provider = {
        "type": "external",
        "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
        "gcs_address": address,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,  # there is nothing to install, and nowhere to go by ssh
    }
    head_type = {**head, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "pretended",
        "max_workers": sum(each["max_workers"] for each in node_types.values()),
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": idle_s / 60,
        "provider": provider,
        "available_node_types": {FAKE_HEAD_NODE_TYPE: head_type, **node_types},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in LISTS},
    }


def _end_processes_of(session: str) -> None:
    """Nodes that the autoscaler started are children of its monitor: nobody ends them with it."""
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if session.encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
