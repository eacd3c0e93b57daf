"""The Kubernetes manifests: valid by the schemas of several versions, and true to themselves and to the code."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from paceline_server.config_fields import config_fields
from paceline_server.server import DRAIN_S
from paceline_server.settings import OTHER_VARIABLES, config_from_mapping

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "deploy" / "kubernetes"
FOLDERS = ["shards", "workers", "internet"]
VERSIONS = ["1.29", kubernetes_validate.latest_version()]
"""The first in which all that is used here is on by default, and the newest."""

MIB = 1 << 20
PROCESS_MIB = 250
DISK_BYTES = 60
"""A shard's process, and the disk for each parameter, as docs/deploy.md says."""

UID = 10001


def resources(folder: str) -> list[dict[str, Any]]:
    """The resources that a kustomization names, as they are before it patches them."""
    kustomization = yaml.safe_load((MANIFESTS / folder / "kustomization.yaml").read_text())
    found: list[dict[str, Any]] = []
    for name in kustomization["resources"]:
        path = (MANIFESTS / folder / name).resolve()
        found += resources(path.name) if path.is_dir() else yaml.safe_load_all(path.read_text())
    return found


def rendered(folder: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    command = ["kubectl", "kustomize", str(MANIFESTS / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def the(kind: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The only resource of a kind."""
    (resource,) = [each for each in found if each["kind"] == kind]
    return resource


TEMPLATES = [
    pytest.param(the("StatefulSet", resources("shards"))["spec"]["template"], id="shard"),
    pytest.param(the("Job", resources("workers"))["spec"]["template"], id="worker"),
]


def quantity(text: str) -> int:
    """A memory or disk quantity in bytes."""
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": MIB, "Gi": 1024 * MIB}[unit]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_schemas_accept_everything(folder: str, version: str) -> None:
    """Every resource is valid, and has no field that the API does not know."""
    for resource in resources(folder):
        kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_what_kustomize_makes_of_it_is_valid(folder: str) -> None:
    """Kustomize builds every folder, its result is valid, and pods mount the configuration under its hashed name."""
    found = rendered(folder)
    for resource in found:
        kubernetes_validate.validate(resource, VERSIONS[-1], strict=True)
    maps = {each["metadata"]["name"] for each in found if each["kind"] == "ConfigMap"}
    named = {
        volume["configMap"]["name"]
        for each in found
        if "template" in each.get("spec", {})
        for volume in each["spec"]["template"]["spec"]["volumes"]
        if "configMap" in volume
    }
    assert named == maps


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_only_the_internet_folder_lets_everybody_in() -> None:
    """Without it only workers of the same namespace reach the shards."""
    rules = {folder: the("NetworkPolicy", rendered(folder))["spec"]["ingress"] for folder in ("shards", "internet")}
    sources = {folder: [next(iter(source)) for source in each[0]["from"]] for folder, each in rules.items()}
    assert sources == {"shards": ["podSelector"], "internet": ["podSelector", "ipBlock", "ipBlock"]}


@pytest.mark.parametrize("folder", FOLDERS)
def test_selectors_find_pods(folder: str) -> None:
    """Whatever selects pods selects those of the templates, by labels that they have."""
    found = resources(folder)
    templates = [each["spec"]["template"]["metadata"]["labels"] for each in found if "template" in each["spec"]]
    by_ordinal = [
        {"statefulset.kubernetes.io/pod-name": f"{each['metadata']['name']}-{ordinal}"}
        for each in found
        if each["kind"] == "StatefulSet"
        for ordinal in range(each["spec"]["replicas"])
    ]
    selectors = []
    for each in found:
        spec = each["spec"]
        if each["kind"] == "Service":
            selectors.append(spec["selector"])
        elif "selector" in spec:
            selectors.append(spec["selector"]["matchLabels"])
        elif "podSelector" in spec:
            selectors.append(spec["podSelector"]["matchLabels"])
    assert selectors
    for selector in selectors:
        assert any(selector.items() <= labels.items() for labels in (*templates, *by_ordinal)), selector


def test_workers_are_let_in_by_the_label_that_they_have() -> None:
    """The shards' policy names the workers' labels."""
    (rule,) = the("NetworkPolicy", resources("shards"))["spec"]["ingress"]
    labels = the("Job", resources("workers"))["spec"]["template"]["metadata"]["labels"]
    assert rule["from"][0]["podSelector"]["matchLabels"].items() <= labels.items()


def test_ports_are_those_of_the_container() -> None:
    """Services and policies name ports that the shard's container has, and it listens there."""
    found = resources("internet")
    container = the("StatefulSet", found)["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for service in (each for each in found if each["kind"] == "Service"):
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    assert the("NetworkPolicy", found)["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": "grpc"}]
    for folder in ("shards", "internet"):
        listen = tomllib.loads((MANIFESTS / folder / "run.toml").read_text())["listen"]
        assert listen == f"0.0.0.0:{ports['grpc']}"
    egress = the("NetworkPolicy", resources("workers"))["spec"]["egress"]
    assert {"protocol": "TCP", "port": ports["grpc"]} in egress[0]["ports"]


@pytest.mark.parametrize("folder", ["shards", "internet"])
def test_the_configuration_is_one_and_fits_the_pods(folder: str, tmp_path: Path) -> None:
    """It names as many shards as there are pods, by the names that workers reach, and files that are mounted."""
    mapping = tomllib.loads((MANIFESTS / folder / "run.toml").read_text())
    found = resources(folder)
    stateful = the("StatefulSet", found)
    container = stateful["spec"]["template"]["spec"]["containers"][0]
    mounts = {Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    files = [*mapping["security"].values(), mapping["storage"]["data_dir"]]
    for file in map(Path, files):
        assert mounts & {file, *file.parents}, file
    for name in mapping["security"]:
        (tmp_path / name).write_text("content")
    readable = {name: str(tmp_path / name) for name in mapping["security"]}
    config = config_from_mapping({**mapping, "shard_index": 0, "security": readable})
    assert config.shards == stateful["spec"]["replicas"]
    service = stateful["spec"]["serviceName"]
    assert service in {each["metadata"]["name"] for each in found if each["kind"] == "Service"}
    if folder == "shards":
        pods = [f"{stateful['metadata']['name']}-{ordinal}.{service}:7070" for ordinal in range(config.shards)]
        assert list(config.shard_addresses) == pods
    shared = {key: value for key, value in mapping.items() if key != "shard_addresses"}
    other = tomllib.loads((MANIFESTS / "shards" / "run.toml").read_text())
    assert shared == {key: other[key] for key in shared}


@pytest.mark.parametrize("template", TEMPLATES)
def test_volumes_and_mounts_agree(template: dict[str, Any]) -> None:
    """Every mount has its volume, and every volume its mount."""
    spec = template["spec"]
    claims = the("StatefulSet", resources("shards"))["spec"]["volumeClaimTemplates"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    if spec["containers"][0]["name"] == "shard":
        volumes |= {claim["metadata"]["name"] for claim in claims}
    assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == volumes


@pytest.mark.parametrize("template", TEMPLATES)
def test_pods_have_no_power(template: dict[str, Any]) -> None:
    """They are not root, cannot become it, write only to volumes, and know nothing of the cluster."""
    spec, (container,) = template["spec"], template["spec"]["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == UID
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert "/tmp" in writable, "temporary files need a place"  # noqa: S108  # a mount's place
    assert not spec["automountServiceAccountToken"]
    assert spec["terminationGracePeriodSeconds"] >= 2 * DRAIN_S
    secrets = [volume["secret"] for volume in spec["volumes"] if "secret" in volume]
    assert [secret["defaultMode"] for secret in secrets] == [0o440]
    for dockerfile in ("Dockerfile.server", "Dockerfile.worker"):
        assert f"USER {UID}:{UID}" in (ROOT / "deploy" / dockerfile).read_text()


@pytest.mark.parametrize("template", TEMPLATES)
def test_variables_and_files_exist(template: dict[str, Any]) -> None:
    """The variables are the configuration's, the health check's or the launcher's; scripts are in the images."""
    (container,) = template["spec"]["containers"]
    of_scripts = set()
    for script in ("healthcheck.py", "worker.sh"):
        text = (ROOT / "deploy" / script).read_text()
        of_scripts |= {f"HEALTHCHECK_{name}" for name in ("ADDRESS", "CA") if name in text}
        of_scripts |= set(re.findall(r"\$\{(\w+)", text))
    valid = {field.variable for field in config_fields().values()} | OTHER_VARIABLES | of_scripts
    assert {variable["name"] for variable in container["env"]} <= valid
    for word in re.findall(r"/opt/paceline/([\w/]+\.\w+)", yaml.safe_dump(container)):
        assert any((ROOT / folder / word).is_file() for folder in ("deploy", ".")), word
    for mount in re.findall(r"(/run/paceline|/etc/paceline)/", yaml.safe_dump(container)):
        assert mount in {each["mountPath"] for each in container["volumeMounts"]}


def test_requests_follow_from_the_model() -> None:
    """A shard asks for what a model of the annotated size takes, by the formulas of docs/deploy.md."""
    stateful = the("StatefulSet", resources("shards"))
    spec = stateful["spec"]
    parameters = int(stateful["metadata"]["annotations"]["run-parameters"]) / spec["replicas"]
    mapping = tomllib.loads((MANIFESTS / "shards" / "run.toml").read_text())
    buffer_mib = config_from_mapping({"exchange": mapping["exchange"]}).exchange.buffer_mib
    resources_of_shard = spec["template"]["spec"]["containers"][0]["resources"]
    needed = 8 * parameters + (PROCESS_MIB + buffer_mib) * MIB
    assert needed <= quantity(resources_of_shard["requests"]["memory"]) < 1.1 * needed
    assert quantity(resources_of_shard["limits"]["memory"]) > quantity(resources_of_shard["requests"]["memory"])
    (claim,) = spec["volumeClaimTemplates"]
    disk = quantity(claim["spec"]["resources"]["requests"]["storage"])
    assert DISK_BYTES * parameters <= disk < 1.2 * DISK_BYTES * parameters


def test_the_internet_has_a_load_balancer_for_each_shard() -> None:
    """Each public address of the configuration belongs to one service, which leads to that shard alone."""
    found = resources("internet")
    balancers = [each for each in found if each["spec"].get("type") == "LoadBalancer"]
    led_to = [each["spec"]["selector"]["statefulset.kubernetes.io/pod-name"] for each in balancers]
    assert led_to == [f"paceline-{index}" for index in range(the("StatefulSet", found)["spec"]["replicas"])]


def test_a_run_is_divided_anew_in_a_pod_with_the_shards_volumes() -> None:
    """Its claims are those that the StatefulSet makes, the new one likewise; it is as confined, with the same user."""
    claim, pod = yaml.safe_load_all((MANIFESTS / "reshard.yaml").read_text())
    for version in VERSIONS:
        for each in (claim, pod):
            kubernetes_validate.validate(each, version, strict=True)
    stateful = the("StatefulSet", resources("shards"))
    (template,) = stateful["spec"]["volumeClaimTemplates"]
    assert claim["spec"] == template["spec"]
    name = f"{template['metadata']['name']}-{stateful['metadata']['name']}"
    claims = [each["persistentVolumeClaim"]["claimName"] for each in pod["spec"]["volumes"][:-1]]
    assert claims == [f"{name}-{index}" for index in range(stateful["spec"]["replicas"] + 1)]
    assert claim["metadata"]["name"] == claims[-1]
    assert {each["name"] for each in pod["spec"]["volumes"]} == {
        mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]
    }
    (shard,), (container,) = stateful["spec"]["template"]["spec"]["containers"], pod["spec"]["containers"]
    assert container["securityContext"] == shard["securityContext"]
    assert pod["spec"]["securityContext"] == stateful["spec"]["template"]["spec"]["securityContext"]
    places = {mount["mountPath"] for mount in container["volumeMounts"]}
    used = set(re.findall(r"(/volumes/\d)", (ROOT / "docs" / "operation.md").read_text()))
    assert used <= places


def test_a_shard_that_drains_is_not_killed() -> None:
    """It serves no more, so no worker is sent to it; but it is alive, and its last snapshot may take minutes."""
    (shard,) = the("StatefulSet", resources("shards"))["spec"]["template"]["spec"]["containers"]
    alive = {probe: "--alive" in shard[probe]["exec"]["command"] for probe in shard if probe.endswith("Probe")}
    assert alive == {"startupProbe": False, "readinessProbe": False, "livenessProbe": True}
