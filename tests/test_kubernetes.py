"""The manifests of deploy/kubernetes are valid, promise what they should, and start as many workers as work needs."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import redis
import yaml

from ourvidz_core.delivery.embedded import EmbeddedRedis
from ourvidz_core.delivery.queue import QueuedCallback
from ourvidz_core.delivery.redis_queue import RedisQueue
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.settings import load
from tests.test_deploy import dockerfiles

ROOT = Path(__file__).parent.parent
MANIFESTS = ROOT / "deploy/kubernetes"
KEDA = json.loads((Path(__file__).parent / "keda_schema.json").read_text("utf-8"))
OBJECTS = [part for path in sorted(MANIFESTS.glob("*.yaml")) for part in yaml.safe_load_all(path.read_text("utf-8"))]
IMAGES, VIDEOS = "sdxl_queue", "wan_queue"


def one(kind: str) -> dict[str, Any]:
    (found,) = [part for part in OBJECTS if part["kind"] == kind]
    return found


def check(manifest: dict[str, Any]) -> None:
    if manifest["apiVersion"].startswith("keda.sh/"):
        jsonschema.validate(manifest, KEDA)
        behavior = manifest["spec"].get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior")
        if behavior is not None:  # which KEDA hands on as it is
            target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "any"}
            spec = {"scaleTargetRef": target, "maxReplicas": 1, "behavior": behavior}
            check({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "spec": spec})
    else:
        kubernetes_validate.validate(manifest, "1.31", strict=True)


@pytest.mark.parametrize("manifest", OBJECTS, ids=lambda part: part["kind"])
def test_the_manifests_have_nothing_that_their_schemas_do_not_know(manifest: dict[str, Any]) -> None:
    check(manifest)
    assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "ourvidz"


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("Deployment", '"terminationGracePeriodSeconds"', '"terminationGraceSeconds"'),
        ("Deployment", '"containerPort": 9464', '"containerPort": "health"'),
        ("NetworkPolicy", '"egress"', '"outgoing"'),
        ("PodDisruptionBudget", '"maxUnavailable"', '"maxUnavailablePods"'),
        ("ScaledObject", '"minReplicaCount": 0', '"minReplicaCount": "none"'),
        ("ScaledObject", '"listName"', '"list"'),
        ("ScaledObject", '"stabilizationWindowSeconds"', '"stabilizationSeconds"'),
        ("TriggerAuthentication", '"parameter": "tls"', '"parameter": "enableTLS"'),
    ],
)
def test_a_mistake_in_a_manifest_is_noticed(kind: str, before: str, after: str) -> None:
    text = json.dumps(one(kind))
    assert before in text
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(json.loads(text.replace(before, after)))


# -- the pod


def test_a_worker_has_time_to_finish_the_longest_job_before_it_is_killed() -> None:
    pod = one("Deployment")["spec"]["template"]["spec"]
    drain_seconds = load(environment(pod)).drain_seconds
    longest = max(job_type.timeout_seconds for job_type in load_registry(load({})).job_types)
    assert drain_seconds >= longest
    assert pod["terminationGracePeriodSeconds"] > drain_seconds + 30


def environment(pod: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "from the pod") for entry in pod["containers"][0]["env"]}


def test_the_pod_s_settings_exist_and_its_probes_ask_where_the_worker_answers() -> None:
    pod = one("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    known = set(re.findall(r"`(OURVIDZ_\w+)`", (ROOT / "docs/reference/settings.md").read_text("utf-8")))
    assert set(environment(pod)) <= known
    host, port = load(environment(pod)).health_address.split(":")
    assert (host, container["ports"]) == ("0.0.0.0", [{"name": "health", "containerPort": int(port)}])
    asked = {probe: container[f"{probe}Probe"]["httpGet"] for probe in ("startup", "liveness", "readiness")}
    assert {probe: get["port"] for probe, get in asked.items()} == dict.fromkeys(asked, "health")
    # An outage of Redis makes a worker unready; a restart would not mend it.
    assert [asked[probe]["path"] for probe in ("startup", "liveness", "readiness")] == [
        "/healthz",
        "/healthz",
        "/readyz",
    ]


def test_the_pod_may_do_nothing_that_a_worker_has_no_need_of() -> None:
    pod = one("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    recipe = dockerfiles.Recipe.read()
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert (recipe.last("USER"), pod["securityContext"]["runAsNonRoot"]) == (user, True)
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_what_a_worker_writes_is_on_a_volume() -> None:
    pod = one("Deployment")["spec"]["template"]["spec"]
    mounted = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    defaults = dockerfiles.Recipe.read().defaults()
    for variable in ("OURVIDZ_STATE_DIR", "OURVIDZ_WORK_DIR", "HOME"):
        assert "emptyDir" in volumes[mounted[defaults[variable]]], variable
    assert {"/tmp", "/dev/shm"} <= set(mounted)
    assert set(mounted.values()) == set(volumes)


def test_nothing_secret_is_in_the_manifests() -> None:
    assert [part["kind"] for part in OBJECTS if part["kind"] == "Secret"] == []
    pod = one("Deployment")["spec"]["template"]["spec"]
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "ourvidz-worker"}}]
    assert not [name for name in environment(pod) if re.search("KEY|SECRET|TOKEN|PASSWORD|URL", name)]


def test_the_policies_are_about_the_workers() -> None:
    labels = one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    assert one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert one("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert one("ScaledObject")["spec"]["scaleTargetRef"]["name"] == one("Deployment")["metadata"]["name"]


# -- how many workers there are


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    made = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    yield made
    made.close()


@pytest.fixture
def queue(server: EmbeddedRedis) -> Iterator[RedisQueue]:
    with redis.Redis.from_url(server.address) as client:
        client.flushall()
        made = RedisQueue(client)
        made.client = client  # type: ignore[attr-defined]
        yield made


def workers(queue: RedisQueue) -> int:
    """How many workers KEDA would want: its count of each key, its formula, and what its autoscaler makes of that."""
    client = queue.client  # type: ignore[attr-defined]
    count = {b"none": lambda key: 0, b"list": client.llen, b"zset": client.zcard, b"hash": client.hlen}
    spec = one("ScaledObject")["spec"]
    found = {}
    for trigger in spec["triggers"]:
        key = trigger["metadata"]["listName"]
        found[trigger["name"]] = float(count[client.type(key)](key))
    modifiers = spec["advanced"]["scalingModifiers"]
    # What the formula uses of KEDA's language is written the same in Python.
    wanted = eval(modifiers["formula"], {"__builtins__": {}, "max": max, "min": min}, copy.copy(found))
    if wanted <= float(modifiers["activationTarget"]):
        return int(spec["minReplicaCount"])
    return min(max(math.ceil(wanted / float(modifiers["target"])), 1), spec["maxReplicaCount"])


def push(queue: RedisQueue, name: str, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        queue.push(name, json.dumps({"id": f"{name}-{number}", "type": "any"}).encode())


def test_no_work_needs_no_worker_and_some_needs_one(queue: RedisQueue) -> None:
    assert workers(queue) == 0
    push(queue, IMAGES, 1)
    assert workers(queue) == 1


def test_what_waits_is_weighed_by_how_long_it_takes(queue: RedisQueue) -> None:
    push(queue, IMAGES, 5)
    assert workers(queue) == 1
    push(queue, VIDEOS, 5)
    assert workers(queue) == 3  # 50 and 750 seconds of work
    push(queue, VIDEOS, 1000, first=5)
    assert workers(queue) == one("ScaledObject")["spec"]["maxReplicaCount"]


def test_a_worker_that_has_a_job_is_never_one_too_many(queue: RedisQueue) -> None:
    push(queue, VIDEOS, 3)
    claims = [queue.claim([VIDEOS], worker=f"w{number}", lease=60) for number in range(3)]
    assert workers(queue) == 3
    for left, claim in enumerate(reversed(claims)):
        assert claim is not None
        assert workers(queue) == 3 - left
        queue.finish(claim, is_final=True)
    assert workers(queue) == 0


def test_a_job_that_shall_run_again_and_a_callback_that_is_not_accepted_need_a_worker(queue: RedisQueue) -> None:
    push(queue, IMAGES, 1)
    claim = queue.claim([IMAGES], worker="w", lease=60)
    assert claim is not None
    queue.hand_back(claim, delay=0.0)
    assert workers(queue) == 1
    claim = queue.claim([IMAGES], worker="w", lease=60)
    assert claim is not None
    callback = QueuedCallback(queue=IMAGES, callback_id="a-1", job_id="a", body=b"{}")
    queue.finish(claim, is_final=True, callback=callback)
    assert workers(queue) == 1
    queue.callback_delivered(callback)
    assert workers(queue) == 0


# -- the page


def test_the_policy_that_the_page_adds_is_valid_and_about_the_workers() -> None:
    page = (ROOT / "docs/how-to/kubernetes.md").read_text("utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    policy = yaml.safe_load(text)
    check(policy)
    assert policy["spec"]["podSelector"] == one("NetworkPolicy")["spec"]["podSelector"]


def test_the_secrets_that_the_page_makes_are_those_that_the_manifests_read() -> None:
    page = (ROOT / "docs/how-to/kubernetes.md").read_text("utf-8")
    files = [re.findall(r"^(\w+)=", text, re.MULTILINE) for text in re.findall(r"```ini\n(.*?)```", page, re.DOTALL)]
    needed = one("TriggerAuthentication")["spec"]["secretTargetRef"]
    assert {entry["key"] for entry in needed} == set(files[1])
    named = {entry["name"] for entry in needed} | {"ourvidz-worker"}
    assert set(re.findall(r"secret generic (\S+) --namespace ourvidz", page)) == named
