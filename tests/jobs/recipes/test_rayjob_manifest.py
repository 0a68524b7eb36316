"""jobs/recipes/rayjob.yaml against the schema of a RayJob and Kubernetes' own schemas."""

import copy
import json
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())
CLAIM, JOB = yaml.safe_load_all((ROOT / "jobs" / "recipes" / "rayjob.yaml").read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]
KUBERNETES = kubernetes_validate.latest_version()


def validate(job):
    """Raise what is wrong with a RayJob."""
    jsonschema.Draft202012Validator(SCHEMA).validate(job)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_manifest_is_valid():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validate(JOB)
    kubernetes_validate.validate(CLAIM, KUBERNETES, strict=True)


HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
GROUP = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)
POD = (*GROUP, "template", "spec")
CONTAINER = (*POD, "containers", 0)
MISTAKES = [
    (("spec",), "shutdownAfterJobFinish", True),
    (("spec",), "backoffLimit", "3"),
    (("spec",), "shutdownAfterJobFinishes", False),  # with a time to live after it
    (("spec", "rayClusterSpec"), "rayVersion", 2.6),
    (("spec", "rayClusterSpec", "autoscalerOptions"), "idleTimeoutSecs", 60),
    (HEAD, "rayStartParams", {"num-cpus": 0}),
    (GROUP, "maxReplica", 8),
    (GROUP, "minReplicas", "1"),
    (POD, "tolerations", {"key": "nvidia.com/gpu"}),
    (POD, "nodeselector", {}),
    (CONTAINER, "envfrom", []),
    (CONTAINER, "image", 1),
    (CONTAINER, "volumeMounts", [{"name": "model-cache"}]),
]


@pytest.mark.parametrize(("place", "field", "value"), MISTAKES)
def test_a_mistake_is_found(place, field, value):
    job = copy.deepcopy(JOB)
    at = job
    for step in place:
        at = at[step]
    at[field] = value
    with pytest.raises(jsonschema.ValidationError):  # kubernetes_validate's is one of those
        validate(job)


def test_a_group_without_its_name_is_found():
    job = copy.deepcopy(JOB)
    del job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]
    with pytest.raises(jsonschema.ValidationError, match="groupName"):
        validate(job)


def test_what_belongs_together_agrees():
    (group,) = CLUSTER["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert f"--workers {group['maxReplicas'] * gpus}" in JOB["spec"]["entrypoint"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={CLUSTER['rayVersion']}" in constraints
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {
        g["template"]["spec"]["containers"][0]["image"] for g in (CLUSTER["headGroupSpec"], group)
    }
    assert {image.rpartition(":")[2] for image in images} == {version}
    (volume,) = group["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
