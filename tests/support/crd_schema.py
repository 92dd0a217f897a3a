"""Kubernetes' CRD schemas as strict JSON schemas, for manifests that no API server has seen."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[2]
PLACES = (ROOT.parent / "shared" / "crds", Path("/work/shared/crds"))
PRESERVE = "x-kubernetes-preserve-unknown-fields"


def crds_dir() -> Path | None:
    """Where the CRDs lie: $REMORA_CRDS, or `shared/crds` beside the checkout; None: nowhere."""
    named = os.environ.get("REMORA_CRDS")
    places = (Path(named),) if named else PLACES
    return next((place for place in places if place.is_dir()), None)


def strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as JSON schema that refuses fields it does not list.

    `x-kubernetes-int-or-string` takes both, `x-kubernetes-preserve-unknown-fields` takes all
    unlisted fields, an object without listed fields stays open, `nullable` takes null as well. CEL
    rules (`x-kubernetes-validations`) are not checked.
    """
    out = {k: v for k, v in schema.items() if not k.startswith("x-") and k != "nullable"}
    if "properties" in schema:
        out["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get(PRESERVE):
            out["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            out[key] = strict(schema[key])
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("anyOf", None)
        out["type"] = ["integer", "string"]
    if schema.get("nullable"):
        return {"anyOf": [{"type": "null"}, out]}
    return out


@functools.cache
def validator(file: Path, version: str) -> Draft202012Validator:
    """A strict validator of one version in a file with a CustomResourceDefinition."""
    crd = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
    schemas = {v["name"]: v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"]}
    schema = strict(schemas[version])
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def faults(file: Path, resource: Mapping[str, Any]) -> list[str]:
    """What is wrong with a resource of `file`'s kind, each as `path: message`; empty: nothing."""
    version = resource["apiVersion"].rpartition("/")[2]
    found = validator(file, version).iter_errors(resource)
    return sorted(f"{error.json_path}: {error.message[:200]}" for error in found)
