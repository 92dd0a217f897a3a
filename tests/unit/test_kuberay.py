"""The KubeRay manifests: rendered by kubectl, held against KubeRay's CRDs, read by our loader."""

import copy
import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.crd_schema import ROOT, crds_dir, faults, strict

from remora.cluster.config import RemoraConfig, preset_names
from remora.cluster.security import API_KEYS_ENV
from remora.comm.errors import ConfigError

# Ray Serve, as it is imported, uses what pydantic has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
KUBERAY = ROOT / "manifests" / "kuberay"
OVERLAYS = ("cpu-dev", "gpu-autoscaling")
HOLDERS = ["dense", "expert"]  # groups of pods with members
Resource = dict[str, Any]


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Resource]]:
    """overlay -> resources, as `kubectl apply -k` would send them."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on PATH: nothing else renders kustomizations as it does")
    found = {}
    for overlay in OVERLAYS:
        command = ["kubectl", "kustomize", str(KUBERAY / "overlays" / overlay)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[overlay] = list(yaml.safe_load_all(done.stdout))
    return found


@pytest.fixture(scope="module")
def service_crd() -> Path:
    folder = crds_dir()
    if folder is None:
        pytest.skip("no CRDs of KubeRay: neither $REMORA_CRDS nor ../shared/crds is a folder")
    return folder / "ray.io_rayservices.yaml"


def one(resources: list[Resource], kind: str) -> Resource:
    """The only resource of that kind."""
    (found,) = (r for r in resources if r["kind"] == kind)
    return found


def cluster_of(resources: list[Resource]) -> Resource:
    """The `rayClusterConfig`."""
    cluster: Resource = one(resources, "RayService")["spec"]["rayClusterConfig"]
    return cluster


def groups_of(resources: list[Resource]) -> dict[str, Resource]:
    """Worker groups by name."""
    return {group["groupName"]: group for group in cluster_of(resources)["workerGroupSpecs"]}


def pods_of(resources: list[Resource]) -> dict[str, Resource]:
    """Pod specs by group, the head's as `head`."""
    groups = {"head": cluster_of(resources)["headGroupSpec"], **groups_of(resources)}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def application_of(resources: list[Resource]) -> Resource:
    """The one application of `serveConfigV2`."""
    serve = yaml.safe_load(one(resources, "RayService")["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    found: Resource = application
    return found


def config_of(resources: list[Resource]) -> RemoraConfig:
    """What `remora.cluster.app:build` makes of the application's arguments."""
    from remora.cluster.app import config_from_args  # here, where warnings are filtered

    return config_from_args(application_of(resources)["args"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberay_takes_it(
    rendered: dict[str, list[Resource]], service_crd: Path, overlay: str
) -> None:
    service = one(rendered[overlay], "RayService")
    assert service["apiVersion"] == "ray.io/v1"
    assert not {name for name in service["spec"] if "UnhealthySecond" in name}, "taken, and unused"
    assert faults(service_crd, service) == []


def _misspell(cluster: Resource) -> None:
    cluster["workerGroupSpecs"][0]["minReplica"] = 1


def _misspell_deep(cluster: Resource) -> None:
    container = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["livenessProbe"]["periodSecond"] = 5


def _text_for_number(cluster: Resource) -> None:
    cluster["workerGroupSpecs"][1]["maxReplicas"] = "8"


def _number_for_text(cluster: Resource) -> None:
    cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _no_such_choice(cluster: Resource) -> None:
    cluster.setdefault("autoscalerOptions", {})["version"] = "v3"


def _missing(cluster: Resource) -> None:
    del cluster["workerGroupSpecs"][0]["groupName"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_misspell, "workerGroupSpecs[0]: Additional properties"),
        (_misspell_deep, "livenessProbe: Additional properties"),
        (_text_for_number, "maxReplicas: '8' is not of type 'integer'"),
        (_number_for_text, "is not of type 'string'"),
        (_no_such_choice, "'v3' is not one of"),
        (_missing, "'groupName' is a required property"),
    ],
)
def test_kuberay_would_refuse(
    rendered: dict[str, list[Resource]],
    service_crd: Path,
    spoil: Callable[[Resource], None],
    says: str,
) -> None:
    service = copy.deepcopy(one(rendered["gpu-autoscaling"], "RayService"))
    spoil(service["spec"]["rayClusterConfig"])
    (fault,) = faults(service_crd, service)
    assert says in fault


def test_schemas_become_strict() -> None:
    listed = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert strict(listed)["additionalProperties"] is False
    assert "additionalProperties" not in strict(
        {**listed, "x-kubernetes-preserve-unknown-fields": True}
    )
    assert strict({"type": "object"}) == {"type": "object"}
    either = {"anyOf": [{"type": "integer"}], "x-kubernetes-int-or-string": True, "pattern": "^1"}
    assert strict(either) == {"type": ["integer", "string"], "pattern": "^1"}
    inner = {"type": "object", "additionalProperties": listed}
    assert strict(inner)["additionalProperties"]["additionalProperties"] is False
    assert {"type": "null"} in strict({"type": "object", "nullable": True})["anyOf"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_our_loader_takes_the_application(
    rendered: dict[str, list[Resource]], overlay: str
) -> None:
    application = application_of(rendered[overlay])
    module, _, function = application["import_path"].partition(":")
    build = getattr(importlib.import_module(module), function)
    served = build(application["args"])._bound_deployment._deployment_config
    assert served.max_surge_percent > 0, "an upgrade ends no ingress before there is another"
    config = config_of(rendered[overlay])
    assert config.name == application["name"], "`remora stop` finds both by one name"
    assert config.bind_address == "0.0.0.0", "pods reach each other over TCP"
    mistaken = {**application["args"], "experts": {"shard": 2}}
    with pytest.raises(ConfigError, match=r"experts\.shard"):
        build(mistaken)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_actors_find_their_pods(rendered: dict[str, list[Resource]], overlay: str) -> None:
    """Labels meet, one actor fills most of a pod, and the first ones fit into what there may be."""
    config, groups = config_of(rendered[overlay]), groups_of(rendered[overlay])
    assert set(groups) == {"dense", "expert"}
    for name, placed, count in (
        ("dense", config.dense, config.dense.groups),
        ("expert", config.experts, config.experts.shards),
    ):
        group = groups[name]
        assert placed.labels == group["labels"] == {"remora.io/role": name}
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        has_cpus = float(limits["cpu"])
        assert has_cpus / 2 < placed.num_cpus <= has_cpus, "one actor a pod"
        assert placed.num_gpus == float(limits.get("nvidia.com/gpu", 0))
        assert count == group["replicas"] <= group["maxReplicas"]
        assert group["minReplicas"] <= group["replicas"]
    assert cluster_of(rendered[overlay])["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_page_scales_the_cluster_that_runs(rendered: dict[str, list[Resource]]) -> None:
    """KubeRay does not pass new numbers of a RayService on to it; the page names what is there."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    found = re.search(r"get raycluster -o name\) --type json -p '(\[.*?\])'", page, re.DOTALL)
    assert found is not None
    for change in json.loads(found[1]):
        assert change["op"] == "replace" and change["value"] == 3
        _, spec, groups, index, key = change["path"].split("/")
        assert (spec, groups) == ("spec", "workerGroupSpecs")
        group = cluster_of(rendered["cpu-dev"])[groups][int(index)]
        assert group["groupName"] == "expert" and group[key] == 2


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_state_lies_on_the_volume(rendered: dict[str, list[Resource]], overlay: str) -> None:
    """Of every pod (Ray may start the coordinator anywhere), apart for each Ray cluster."""
    config, claim = config_of(rendered[overlay]), one(rendered[overlay], "PersistentVolumeClaim")
    for pod in pods_of(rendered[overlay]).values():
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts) == set(volumes)
        claimed = volumes["state"]["persistentVolumeClaim"]["claimName"]
        assert claimed == claim["metadata"]["name"]
        where = Path(mounts["state"]["mountPath"])
        assert mounts["state"]["subPathExpr"] == "$(REMORA_RAY_CLUSTER)"
        assert "REMORA_RAY_CLUSTER" in {env["name"] for env in container["env"]}
        for path in kept(config):
            assert path.is_relative_to(where)


def kept(config: RemoraConfig) -> list[Path]:
    """Folders that must outlive a pod."""
    assert config.router.state_dir is not None and config.elastic.log_dir is not None
    return [config.router.state_dir, config.elastic.log_dir]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_and_drain(rendered: dict[str, list[Resource]], overlay: str) -> None:
    pods = pods_of(rendered[overlay])
    for name, pod in pods.items():
        (container,) = pod["containers"]
        assert "local_raylet_healthz" in container["livenessProbe"]["exec"]["command"][-1]
        ready = container["readinessProbe"]
        if name == "head":
            assert "gcs_healthz" in ready["exec"]["command"][-1]
        else:
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ready["httpGet"]["path"] == "/ready"
            assert ports[ready["httpGet"]["port"]] == 8000
    assert [name for name, pod in pods.items() if "lifecycle" in pod["containers"][0]] == HOLDERS
    for name in HOLDERS:
        hook = pods[name]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1].split()
        start = hook.index("remora.cluster.node_drain")
        assert hook[start + 1] == config_of(rendered[overlay]).name
        assert hook[start + 2] == "--within-s"
        assert float(hook[start + 3]) < pods[name]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_change_of_ingresses_cuts_no_stream(
    rendered: dict[str, list[Resource]], overlay: str
) -> None:
    """At each one HAProxy starts anew, and the old process ends after this time, streams or not."""
    from ray.serve._private import constants  # here, where warnings are filtered

    longest_s = config_of(rendered[overlay]).http.request_timeout_s
    for pod in pods_of(rendered[overlay]).values():
        told = {env["name"]: env.get("value") for env in pod["containers"][0]["env"]}
        assert float(told["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= longest_s
        unknown = {
            name for name in told if name.startswith("RAY_") and not hasattr(constants, name)
        }
        assert not unknown, "Serve reads no such variable"


def test_a_door_that_is_meant_to_be_closed_is(rendered: dict[str, list[Resource]]) -> None:
    """Keys that are missing, or lie under another name in the secret, must not open it."""
    for overlay, is_optional in (("cpu-dev", True), ("gpu-autoscaling", False)):
        for pod in pods_of(rendered[overlay]).values():
            sources = {env["name"]: env.get("valueFrom") for env in pod["containers"][0]["env"]}
            keys = sources[API_KEYS_ENV]["secretKeyRef"]
            assert (keys["name"], keys["key"]) == ("remora-api-keys", "keys")
            assert keys.get("optional", False) is is_optional


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted(rendered: dict[str, list[Resource]], overlay: str) -> None:
    """As the Pod Security Standard of that name says, KubeRay's own container included."""
    cluster = cluster_of(rendered[overlay])
    contexts = []
    if cluster["enableInTreeAutoscaling"]:
        contexts = [cluster["autoscalerOptions"]["securityContext"]]
    for pod in pods_of(rendered[overlay]).values():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        contexts += [container["securityContext"] for container in pod["containers"]]
    for context in contexts:
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_machines_share_the_pods_of_a_group(
    rendered: dict[str, list[Resource]], overlay: str
) -> None:
    """Replicas of an expert are on different hosts, and those are pods."""
    for name, pod in pods_of(rendered[overlay]).items():
        if name in HOLDERS:
            (spread,) = pod["topologySpreadConstraints"]
            assert spread["topologyKey"] == "kubernetes.io/hostname" and spread["maxSkew"] == 1
            assert spread["labelSelector"] == {"matchLabels": {"ray.io/group": name}}
            assert spread["matchLabelKeys"] == ["ray.io/cluster"]
            assert spread["whenUnsatisfiable"] == "ScheduleAnyway", "one machine is enough"


def test_overlays_differ_as_promised(rendered: dict[str, list[Resource]]) -> None:
    small, large = (cluster_of(rendered[overlay]) for overlay in OVERLAYS)
    assert large["enableInTreeAutoscaling"] and large["autoscalerOptions"]["version"] == "v2"
    assert not small["enableInTreeAutoscaling"] and "autoscalerOptions" not in small
    for overlay, cluster in (("cpu-dev", small), ("gpu-autoscaling", large)):
        told = config_of(rendered[overlay]).elastic.nodes_may_come
        assert told is cluster["enableInTreeAutoscaling"], overlay
    redis = large["gcsFaultToleranceOptions"]
    assert redis["redisPassword"]["valueFrom"]["secretKeyRef"] == {
        "name": "remora-redis",
        "key": "password",
    }
    assert "gcsFaultToleranceOptions" not in small
    for resources, mode in ((rendered["cpu-dev"], "Once"), (rendered["gpu-autoscaling"], "Many")):
        claim = one(resources, "PersistentVolumeClaim")
        assert claim["spec"]["accessModes"] == [f"ReadWrite{mode}"]
    for name, group in groups_of(rendered["gpu-autoscaling"]).items():
        assert group["minReplicas"] < group["replicas"] < group["maxReplicas"] or name == "dense"
        assert group["template"]["spec"]["tolerations"]
    images = {
        overlay: {pod["containers"][0]["image"] for pod in pods_of(rendered[overlay]).values()}
        for overlay in OVERLAYS
    }
    assert images == {
        "cpu-dev": {"localhost/remora:dev"},
        "gpu-autoscaling": {"registry.example.com/remora:0.1.0-cuda"},
    }
    namespaces = [{r["metadata"]["namespace"] for r in rendered[overlay]} for overlay in OVERLAYS]
    assert namespaces == [{"remora-dev"}, {"remora"}]


def test_ray_is_the_pinned_one(rendered: dict[str, list[Resource]]) -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster_of(rendered['cpu-dev'])['rayVersion']}" in pins


def test_manifests_are_no_presets() -> None:
    """They lie in the same package (and its wheel), a folder below."""
    assert preset_names() == ["tiny_cpu"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_one_shard_fewer_still_holds_the_model(
    rendered: dict[str, list[Resource]], overlay: str
) -> None:
    """Else a drain is refused."""
    config = config_of(rendered[overlay])
    num_experts = {"demo-model": 32, "Qwen3-30B-A3B": 128}[config.model_id]
    assert config.experts.slots is not None
    assert (config.experts.shards - 1) * config.experts.slots >= num_experts
