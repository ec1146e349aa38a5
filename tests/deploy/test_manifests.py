"""The manifests are what Compose and Kubernetes take, and agree with each other and with this server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kubernetes_validate as validator
import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
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


def test_what_is_set_are_settings_of_this_server() -> None:
    from tinsmith.server.settings import Settings

    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["tinsmith"]["environment"]
    names = {*compose, *(each["name"] for each in container("Deployment", "tinsmith")["env"])}
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
