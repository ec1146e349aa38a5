"""The manifests are what Compose and Kubernetes take, and agree with each other and with this server."""

from __future__ import annotations

import base64
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate as validator
import pytest
import yaml
from docs.pages import of_page

DEPLOY = Path(__file__).parents[2] / "deploy"
ONE_POD = DEPLOY / "kubernetes" / "one-pod" / "tinsmith.yaml"
PAGE = "kubernetes.md"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("[!k]*.yaml"))


def documents() -> list[dict]:
    return [each for file in MANIFESTS for each in yaml.safe_load_all(file.read_text())]


def container(kind: str, name: str) -> dict:
    (found,) = (each for each in documents() if (each["kind"], each["metadata"]["name"]) == (kind, name))
    (only,) = found["spec"]["template"]["spec"]["containers"]
    return only


def check_compose(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compose_takes_its_file(tmp_path: Path) -> None:
    done = check_compose(DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stdout
    wrong = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    wrong["services"]["sglang"]["volume"] = wrong["services"]["sglang"].pop("volumes")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    assert "volume" in check_compose(tmp_path / "wrong.yaml").stdout


def test_kubernetes_takes_its_manifests() -> None:
    """Strictly: no field that it does not know."""
    assert len(documents()) == 7
    for document in documents():
        validator.validate(document, "1.34", strict=True)
    (wrong,) = (each for each in documents() if each["kind"] == "StatefulSet")
    wrong["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, "1.34", strict=True)


def test_the_ledger_is_on_no_volume_of_several_machines() -> None:
    """SQLite's write-ahead log needs a file system of one machine."""
    claims = {
        each["metadata"]["name"]: each for each in documents() if each["kind"] == "PersistentVolumeClaim"
    }
    (deployment,) = (each for each in documents() if each["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    (url,) = (each["value"] for each in server["env"] if each["name"] == "TINSMITH_DATABASE_URL")
    assert url.startswith("sqlite:////")
    folder = Path(url.removeprefix("sqlite:///")).parent
    (mount,) = (each for each in server["volumeMounts"] if Path(each["mountPath"]) == folder)
    (volume,) = (each for each in pod["volumes"] if each["name"] == mount["name"])
    claim = claims[volume["persistentVolumeClaim"]["claimName"]]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert deployment["spec"]["strategy"]["type"] == "Recreate", "the new pod waits for the old one's disk"


def test_all_manifests_are_applied() -> None:
    found = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    assert sorted(found["resources"]) == [file.name for file in MANIFESTS]


def test_the_variables_of_the_manifests_are_settings_of_this_server() -> None:
    from tinsmith.server.settings import Settings

    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["tinsmith"]["environment"]
    names = {*compose, *(each["name"] for each in container("Deployment", "tinsmith")["env"])}
    names |= {each["name"] for each in one_pod()[0]["spec"]["template"]["spec"]["containers"][0]["env"]}
    names -= {"HF_TOKEN"}
    settings = {f"TINSMITH_{name.upper()}" for name in Settings.model_fields}
    assert names <= settings, names - settings
    assert "TINSMITH_SGLANG" in names


def test_samplers_are_named_where_they_are() -> None:
    """The server's URLs are the pods of the stateful set, and both see the data under one path."""
    ours, theirs = container("Deployment", "tinsmith"), container("StatefulSet", "sglang")
    (urls,) = (each["value"] for each in ours["env"] if each["name"] == "TINSMITH_SGLANG")
    (pods,) = (each for each in documents() if each["kind"] == "StatefulSet")
    port = theirs["ports"][0]["containerPort"]
    service = pods["spec"]["serviceName"]
    expected = [f"http://sglang-{i}.{service}:{port}" for i in range(pods["spec"]["replicas"])]
    assert urls.split(",") == expected
    mounts = [{each["name"]: each["mountPath"] for each in of["volumeMounts"]} for of in (ours, theirs)]
    assert mounts[0]["data"] == mounts[1]["data"] == "/data"
    assert f"--port={port}" in theirs["command"]


# --- docs/kubernetes.md, whose manifest is one pod


def one_pod() -> tuple[dict, dict]:
    stateful_set, service = yaml.safe_load_all(ONE_POD.read_text())
    return stateful_set, service


def commands(begins: str) -> list[list[str]]:
    """The page's commands that begin so, in words."""
    lines = "\n".join(each.text for each in of_page(PAGE)).splitlines()
    return [shlex.split(line) for line in lines if line.startswith(begins)]


def secrets_of(document: dict) -> set[str]:
    """The keys of the secret that a manifest's containers read."""
    (only,) = document["spec"]["template"]["spec"]["containers"]
    references = [each["valueFrom"]["secretKeyRef"] for each in only["env"] if "valueFrom" in each]
    assert {each["name"] for each in references} == {"tinsmith"}
    return {each["key"] for each in references}


def test_kubernetes_takes_the_pod_s_manifest() -> None:
    for document in one_pod():
        validator.validate(document, "1.34", strict=True)


def test_the_pod_is_probed_stopped_and_stored_as_the_server_needs() -> None:
    from tinsmith.server.http.openapi import OPEN_PATHS
    from tinsmith.server.settings import Settings

    stateful_set, service = one_pod()
    assert stateful_set["spec"]["replicas"] == 1
    pod = stateful_set["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    probes = [server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert probes == ["/healthz", "/health", "/healthz"]
    assert set(probes) <= OPEN_PATHS
    assert pod["terminationGracePeriodSeconds"] > Settings.model_fields["stop_patience_seconds"].default
    claims = {each["metadata"]["name"]: each["spec"] for each in stateful_set["spec"]["volumeClaimTemplates"]}
    mounts = {each["name"]: each["mountPath"] for each in server["volumeMounts"]}
    assert claims.keys() == mounts.keys()
    assert all(claim["accessModes"] == ["ReadWriteOnce"] for claim in claims.values())
    image = (DEPLOY / "Dockerfile").read_text()
    assert f"TINSMITH_DATA_DIR={mounts['data']} TINSMITH_CACHE_DIR={mounts['cache']}" in image
    assert f"HF_HOME={mounts['models']}" in image
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (1000, 1000)
    assert service["spec"]["selector"] == stateful_set["spec"]["selector"]["matchLabels"]
    assert service["metadata"]["name"] == stateful_set["spec"]["serviceName"]


def test_the_page_s_commands_name_what_the_manifests_have() -> None:
    stateful_set, service = one_pod()
    (server,) = stateful_set["spec"]["template"]["spec"]["containers"]
    (build,), (push,) = commands("docker build"), commands("docker push")
    assert build[build.index("-t") + 1] == push[-1] == server["image"]
    assert (DEPLOY.parent / build[build.index("-f") + 1]).is_file()

    kubectl = commands("kubectl")
    alone, with_sglang = (
        {word.split("=")[1] for word in each if word.startswith("--from-literal=")}
        for each in kubectl
        if each[1:5] == ["create", "secret", "generic", "tinsmith"]
    )
    assert alone == secrets_of(stateful_set)
    (deployment,) = (each for each in documents() if each["kind"] == "Deployment")
    (samplers,) = (each for each in documents() if each["kind"] == "StatefulSet")
    assert with_sglang == secrets_of(deployment) | secrets_of(samplers)

    name = stateful_set["metadata"]["name"]
    pods = {each[2] for each in kubectl if each[1] in ("exec", "logs")}
    assert pods == {f"{name}-0"}
    targets = {
        each[3] if each[1] == "rollout" else each[2]
        for each in kubectl
        if each[1] in ("rollout", "port-forward")
    }
    assert targets == {f"statefulset/{name}", f"service/{service['metadata']['name']}"}
    files = {each[-1] for each in kubectl if each[1] == "apply"}
    assert files == {str(each.relative_to(DEPLOY.parent)) for each in (ONE_POD, DEPLOY / "kubernetes")}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here: apt install kubernetes-client")
def test_kubectl_makes_the_secret_and_the_kustomization() -> None:
    """Without a cluster: what it would send. The key in the secret is one that the server reads."""
    from tinsmith.server.settings import parse_keys

    def kubectl(*arguments: str) -> list[dict]:
        done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, check=True)
        return [*yaml.safe_load_all(done.stdout)]

    create, _with_sglang = (each[1:] for each in commands("kubectl create secret"))
    (secret,) = kubectl(*(word.replace("...", "abc") for word in create), "--dry-run=client", "--output=yaml")
    (key,) = parse_keys([base64.b64decode(secret["data"]["api-key"]).decode()])
    assert key.owner == "admin"
    applied = kubectl("kustomize", str(DEPLOY / "kubernetes"))
    assert sorted(each["kind"] for each in applied) == sorted(each["kind"] for each in documents())
