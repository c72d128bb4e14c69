"""The RayJob and its image: every field is one that KubeRay and Kubernetes have, and nothing is left open.

KubeRay's own schema is a file of megabytes that no package carries, so `KUBERAY` has the names, types and
choices of the parts that a RayJob is made of, from the API reference of KubeRay 1.7.0. What lies in a pod is
checked by the models of Kubernetes' own Python client: a field that they do not know gets lost in them.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from kubernetes.client import ApiClient

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "rayjob.yaml").read_text()
ACCOUNT, JOB = (json.loads(json.dumps(part)) for part in yaml.safe_load_all(TEXT))
POD = "V1PodTemplateSpec"
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
KUBERAY: dict[str, dict[str, Any]] = {
    "RayJob": {"apiVersion": ["ray.io/v1"], "kind": ["RayJob"], "metadata": "V1ObjectMeta", "spec": "RayJobSpec"},
    "RayJobSpec": {
        **dict.fromkeys(("entrypoint", "runtimeEnvYAML", "jobId", "entrypointResources", "managedBy"), "string"),
        **dict.fromkeys(("activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"), "integer"),
        **dict.fromkeys(("entrypointNumCpus", "entrypointNumGpus"), "number"),
        **dict.fromkeys(("shutdownAfterJobFinishes", "suspend"), "boolean"),
        "preRunningDeadlineSeconds": "integer",
        "submissionMode": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"],
        "submitterConfig": "SubmitterConfig", "submitterPodTemplate": POD, "rayClusterSpec": "RayClusterSpec",
        "metadata": TEXTS, "clusterSelector": TEXTS,
    },
    "SubmitterConfig": {"backoffLimit": "integer"},
    "RayClusterSpec": {
        "rayVersion": "string", "authOptions": "AuthOptions", "enableInTreeAutoscaling": "boolean",
        "autoscalerOptions": "AutoscalerOptions", "headGroupSpec": "HeadGroupSpec", "suspend": "boolean",
        "workerGroupSpecs": {"type": "array", "items": {"$ref": "#/$defs/WorkerGroupSpec"}},
        "headServiceAnnotations": TEXTS, "managedBy": "string",
    },
    "AuthOptions": {"mode": ["disabled", "token"], "secretName": "string", "enableK8sTokenAuth": "boolean"},
    "AutoscalerOptions": {
        "version": ["v1", "v2"], "idleTimeoutSeconds": "integer", "image": "string",
        "upscalingMode": ["Default", "Aggressive", "Conservative"], "resources": "V1ResourceRequirements",
    },
    "HeadGroupSpec": {
        "template": POD, "rayStartParams": TEXTS, "resources": TEXTS, "labels": TEXTS,
        "serviceType": ["ClusterIP", "NodePort", "LoadBalancer"], "enableIngress": "boolean",
    },
    "WorkerGroupSpec": {
        "template": POD, "rayStartParams": TEXTS, "resources": TEXTS, "labels": TEXTS, "groupName": "string",
        **dict.fromkeys(("replicas", "minReplicas", "maxReplicas", "numOfHosts"), "integer"),
        **dict.fromkeys(("idleTimeoutSeconds", "priority"), "integer"), "suspend": "boolean",
    },
}  # fmt: skip
REQUIRED = {
    "RayJob": ["apiVersion", "kind", "metadata", "spec"],
    "RayJobSpec": ["entrypoint", "rayClusterSpec"],
    "RayClusterSpec": ["headGroupSpec"],
    "HeadGroupSpec": ["template"],
    "WorkerGroupSpec": ["groupName", "template"],
}


def field(kind: Any) -> dict[str, Any]:
    """A field's JSON schema from its entry in `KUBERAY`."""
    if isinstance(kind, dict):
        return kind
    if isinstance(kind, list):
        return {"enum": kind}
    if kind in KUBERAY:
        return {"$ref": f"#/$defs/{kind}"}
    return {"kubernetes": kind} if kind.startswith("V1") else {"type": kind}


SCHEMA = {
    "$ref": "#/$defs/RayJob",
    "$defs": {
        name: {
            "type": "object",
            "additionalProperties": False,
            "properties": {key: field(kind) for key, kind in fields.items()},
            "required": REQUIRED.get(name, []),
        }
        for name, fields in KUBERAY.items()
    },
}


def of_kubernetes(validator: Any, kind: str, value: Any, schema: Any) -> Any:
    """A JSON schema keyword: the value goes through Kubernetes' model of its kind and comes out as it was."""
    api = ApiClient()
    try:
        again = api.sanitize_for_serialization(api.deserialize(SimpleNamespace(data=json.dumps(value)), kind))
    except (ValueError, TypeError, AttributeError) as error:
        yield jsonschema.ValidationError(f"no {kind}: {error}")
        return
    if again != value:
        yield jsonschema.ValidationError(f"no {kind}: {value!r} is read as {again!r}")


Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"kubernetes": of_kubernetes})


def problems(job: Any) -> list[str]:
    return [error.message for error in Validator(SCHEMA).iter_errors(job)]


def containers(job: Any) -> list[Any]:
    cluster = job["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return [container for pod in pods for container in pod["containers"]]


def test_every_field_is_known_and_of_its_type() -> None:
    assert problems(JOB) == []
    assert list(of_kubernetes(None, "V1ServiceAccount", ACCOUNT, None)) == []


def rename(place: Callable[[Any], Any], old: str, new: str) -> Callable[[Any], None]:
    def change(job: Any) -> None:
        there = place(job)
        there[new] = there.pop(old)

    return change


def put(place: Callable[[Any], Any], key: Any, value: Any) -> Callable[[Any], None]:
    def change(job: Any) -> None:
        place(job)[key] = value

    return change


def spec(job: Any) -> Any:
    return job["spec"]


def cluster(job: Any) -> Any:
    return job["spec"]["rayClusterSpec"]


def gpu(job: Any) -> Any:
    return cluster(job)["workerGroupSpecs"][1]


def pod(job: Any) -> Any:
    return gpu(job)["template"]["spec"]


MISTAKES = {
    "a letter of a RayJob's field": rename(spec, "backoffLimit", "backofLimit"),
    "a field of the cluster": rename(cluster, "authOptions", "authOption"),
    "a field of a group": rename(gpu, "maxReplicas", "maxReplica"),
    "a field of a pod": rename(pod, "tolerations", "toleration"),
    "a field of a container": rename(lambda j: pod(j)["containers"][0], "volumeMounts", "volumeMount"),
    "deep in a pod": rename(lambda j: pod(j)["containers"][0]["resources"], "requests", "request"),
    "deep in a volume": rename(lambda j: pod(j)["volumes"][0]["ephemeral"], "volumeClaimTemplate", "volumeClaim"),
    "deep in security": rename(lambda j: pod(j)["securityContext"], "runAsNonRoot", "runAsNonroot"),
    "a kind of authentication": put(lambda j: cluster(j)["authOptions"], "mode", "tokens"),
    "an autoscaler": put(lambda j: cluster(j)["autoscalerOptions"], "version", "v3"),
    "a number as text": put(spec, "backoffLimit", "3"),
    "a start parameter as a number": put(lambda j: gpu(j)["rayStartParams"], "num-cpus", 0),
    "a container without a name": lambda j: pod(j)["containers"][0].pop("name"),
    "no pod": lambda j: gpu(j).pop("template"),
    "an older API": put(lambda j: j, "apiVersion", "ray.io/v1alpha1"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_slip_of_the_pen_is_found(mistake: str) -> None:
    job = copy.deepcopy(JOB)
    MISTAKES[mistake](job)
    assert job != JOB and problems(job)


def test_the_job_is_tried_again_and_cleans_up() -> None:
    assert spec(JOB)["backoffLimit"] >= 1 and spec(JOB)["shutdownAfterJobFinishes"]
    assert spec(JOB)["ttlSecondsAfterFinished"] > 0
    assert spec(JOB)["entrypoint"].startswith("python -m jobs.")


def test_the_cluster_scales_has_a_token_and_a_head_without_work() -> None:
    assert cluster(JOB)["authOptions"]["mode"] == "token"
    assert cluster(JOB)["enableInTreeAutoscaling"] and cluster(JOB)["autoscalerOptions"]["version"] == "v2"
    assert cluster(JOB)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster(JOB)["headGroupSpec"]["serviceType"] == "ClusterIP", "nothing is reached from outside"
    groups = cluster(JOB)["workerGroupSpecs"]
    assert all(group["minReplicas"] < group["maxReplicas"] for group in groups)
    of_gpus = ["nvidia.com/gpu" in c["resources"]["limits"] for c in containers(JOB)]
    assert of_gpus == [False, False, True]


def test_pods_have_no_rights_beyond_their_account_and_a_disk_to_spill_to() -> None:
    for container in containers(JOB):
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"name": "spill", "mountPath": "/spill"} in container["volumeMounts"]
        assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
    for group in (cluster(JOB)["headGroupSpec"], *cluster(JOB)["workerGroupSpecs"]):
        within = group["template"]["spec"]
        assert within["serviceAccountName"] == ACCOUNT["metadata"]["name"]
        assert within["securityContext"]["runAsNonRoot"] is True
        assert [volume["name"] for volume in within["volumes"]] == ["spill"]
        assert group["rayStartParams"]["object-spilling-directory"] == "/spill"
    assert not re.search(r"privileged: true|hostNetwork|hostPath|AKIA|SECRET_ACCESS_KEY", TEXT)


def test_image_job_and_tests_have_one_ray() -> None:
    docker = (ROOT / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{ray.__version__}-py" in docker
    assert cluster(JOB)["rayVersion"] == ray.__version__
    assert {c["image"] for c in containers(JOB)} == set(re.findall(r"docker build -t (\S+)", docker))
    for line in re.findall(r"^COPY --\S+ (.+) \S+$", docker, re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists(), name
