"""Tokens in place of keys: who made them, for how long, for which key."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest
from starlette.testclient import TestClient
from tinsmith.server.access import Claims, Tokens, UrlSigner
from tinsmith.server.app import create_app
from tinsmith.server.ledger.ledger import Ledger
from tinsmith.server.settings import Settings

ALICE = Claims("alice", "0123456789ab")


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_it_is_good_for_its_time_and_after_a_start(tmp_path: Path) -> None:
    clock = Clock()
    token = Tokens(UrlSigner(tmp_path, 60), 100, clock).issue(ALICE)
    clock.now += 99
    assert Tokens(UrlSigner(tmp_path, 60), 100, clock).claims(token) == ALICE
    clock.now += 1
    assert Tokens(UrlSigner(tmp_path, 60), 100, clock).claims(token) is None


def test_nothing_in_it_can_be_altered(tmp_path: Path) -> None:
    signer = UrlSigner(tmp_path, 60)
    tokens = Tokens(signer, 100)
    token = tokens.issue(ALICE)
    header, payload, signature = token.split(".")
    said = json.loads(base64.urlsafe_b64decode(payload + "=="))
    assert token.startswith("eyJ")
    wrong = ["", "eyJ", "eyJ..", f"{header}.{payload}.", f"{header}.{payload}", token[:-4] + "AAAA"]
    for name, value in (("org_id", "bob"), ("exp", said["exp"] + 1), ("key", "0")):
        other = base64.urlsafe_b64encode(json.dumps(said | {name: value}).encode()).decode().rstrip("=")
        wrong.append(f"{header}.{other}.{signature}")
    wrong.append(jwt.encode(said, None, "none"))
    wrong.append(jwt.encode(said, b"0" * 32, "HS256"))
    # Signed URLs' secret is another one, and what it signs is no token.
    wrong.append(jwt.encode(said, (tmp_path / "url_secret").read_bytes(), "HS256"))
    wrong.append(jwt.encode(said | {"iss": "other"}, signer.derived_secret("tokens"), "HS256"))
    assert [tokens.claims(each) for each in wrong] == [None] * len(wrong)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A client of an application that is not started and has only a ledger: authentication comes first."""
    settings = Settings(data_dir=tmp_path, api_key=["alice=tml-a", "bob=tml-b"], token_seconds=1)
    app, ledger = create_app(settings, []), Ledger(settings.ledger_url)
    app.state.services.add([ledger])
    yield TestClient(app)
    ledger.close()


def exchange(client: TestClient, key: str) -> str:
    answer = client.post("/api/v1/auth/token", json={}, headers={"X-API-Key": key})
    assert answer.status_code == 200, answer.text
    return answer.json()["jwt"]


def config(client: TestClient, token: str):
    return client.post("/api/v1/client/config", json={}, headers={"X-API-Key": token})


def test_it_opens_what_its_key_opens(client: TestClient) -> None:
    token = exchange(client, "tml-a")
    assert config(client, token).status_code == 200
    bearer = client.post("/api/v1/client/config", headers={"Authorization": f"Bearer {token}"})
    assert bearer.status_code == 200
    me = client.get("/api/v1/auth/apikey/me", headers={"X-API-Key": token}).json()
    assert me["details"]["org_details"]["name"] == "alice"
    assert exchange(client, token) == token, "a token cannot be renewed with itself"
    assert client.delete("/api/v1/auth/apikey/me", headers={"X-API-Key": token}).status_code == 403


def test_a_wrong_one_says_that_another_is_needed(client: TestClient, tmp_path: Path) -> None:
    clock = Clock()
    past = Tokens(UrlSigner(tmp_path, 60), 1, clock)
    key_id = jwt.decode(exchange(client, "tml-a"), options={"verify_signature": False})["key"]
    others = Tokens(UrlSigner(tmp_path, 60), 100)
    wrong = [
        past.issue(Claims("alice", key_id)),  # in 1970
        exchange(client, "tml-a")[:-4] + "AAAA",
        others.issue(Claims("alice", "ffffffffffff")),  # of a key that was taken away
        others.issue(Claims("bob", key_id)),  # of a key that is another's now
    ]
    for token in wrong:
        refused = config(client, token)
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert "WWW-Authenticate" not in config(client, "tml-c").headers, "no exchange makes that one right"
    assert config(client, others.issue(Claims("alice", key_id))).status_code == 200


def test_clients_are_told_to_exchange_only_if_it_is_set(tmp_path: Path) -> None:
    told = []
    for exchanged in (False, True):
        app = create_app(Settings(data_dir=tmp_path, token_exchange=exchanged), [])
        told.append(
            TestClient(app, base_url="http://localhost")
            .post("/api/v1/client/config", json={})
            .json()["pjwt_auth_enabled"]
        )
    assert told == [False, True]
