"""Sessions that are searched, sampling clients that are copied, checkpoints that are copied: over the SDK."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
import tinker
from conformance.conftest import ALICE, BOB
from conformance.server_process import ServerProcess
from conformance.test_sdk_checkpoints import PROMPT
from tinker import types


@pytest.fixture(scope="module")
def rest(server: ServerProcess) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=ALICE)


@pytest.mark.filterwarnings("ignore:.*search_sessions is experimental")
def test_sessions_are_found_by_what_is_known_of_them(server: ServerProcess, rest: tinker.RestClient) -> None:
    services = {}
    for name, number in (("Nightly run ABC", "1"), ("nightly rerun", "2"), ("Daily run", "2")):
        services[name] = tinker.ServiceClient(
            base_url=server.url,
            api_key=ALICE,
            display_name=name,
            user_metadata={"batch": number, "of": "search"},
            project_id="searched" if number == "2" else None,
        )
    first = services["Nightly run ABC"].create_lora_training_client(base_model="tiny", rank=4).result()
    saved = first.save_state("kept").result().path
    for name in ("nightly rerun", "Daily run"):
        services[name].create_sampling_client(base_model="tiny").result()
    services["Daily run"].close("errored", "it broke").result()

    def names(**wanted) -> list[str | None]:
        found = rest.search_sessions(
            types.SessionSearchRequest(**({"user_metadata": {"of": "search"}} | wanted))
        ).result()
        return [each.display_name for each in found.sessions]

    assert names() == ["Daily run", "nightly rerun", "Nightly run ABC"], "newest first"
    assert names(display_name="RUN nightly") == ["nightly rerun", "Nightly run ABC"], "each word, any case"
    assert names(user_metadata={"batch": "2", "of": "search"}) == ["Daily run", "nightly rerun"]
    assert names(project_ids=["searched"], display_name="daily") == ["Daily run"]
    assert names(statuses=[types.ActiveSessionStatusQuery()]) == ["nightly rerun", "Nightly run ABC"]
    broken = types.ClientFinishedSessionStatusQuery(reasons=["errored"])
    assert names(statuses=[broken]) == ["Daily run"]
    assert names(statuses=[types.CancelledSessionStatusQuery()]) == []
    of_first = saved.removeprefix("tinker://").partition(":")[0]
    assert names(session_id=of_first) == ["Nightly run ABC"]
    assert names(session_id=of_first, display_name="daily") == ["Daily run", "Nightly run ABC"], "either"

    request = types.SessionSearchRequest(user_metadata={"of": "search"}, limit=2)
    page = rest.search_sessions(request).result()
    assert page.next_cursor is not None
    last = rest.search_sessions(request.model_copy(update={"cursor": page.next_cursor})).result()
    (found,) = last.sessions
    assert (found.session_id, last.next_cursor) == (of_first, None)
    assert (found.checkpoints_count, found.status) == (1, types.SessionActive())
    assert found.checkpoint_storage_bytes > 0
    finished = page.sessions[0].status
    assert (finished.reason.type, finished.detail) == ("errored", "it broke")
    bobs = tinker.RestClient(base_url=server.url, api_key=BOB)
    everybodys = types.SessionSearchRequest(session_id=of_first, owner=types.AccessibleSearchOwner())
    assert bobs.search_sessions(everybodys).result().sessions == []
    for name in ("Nightly run ABC", "nightly rerun"):
        services[name].close("success").result()


def test_copies_of_a_sampling_client_have_numbers_of_their_own(
    service: tinker.ServiceClient, monkeypatch: pytest.MonkeyPatch, server: ServerProcess
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    monkeypatch.setenv("TINKER_API_KEY", ALICE)
    sampler = service.create_sampling_client(base_model="tiny").result()
    copies = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
    expected = sampler.compute_logprobs(PROMPT).result()
    for copy in copies:
        np.testing.assert_allclose(copy.compute_logprobs(PROMPT).result()[1:], expected[1:], atol=1e-5)
    assert [copy._cloned_sampler_id for copy in copies] == [1, 2]


def test_a_copied_checkpoint_outlives_its_source(
    service: tinker.ServiceClient, training: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    state = training.save_state("state").result().path
    weights = training.save_weights_for_sampler("sampler").result().path
    expected = service.create_sampling_client(model_path=weights).result().compute_logprobs(PROMPT).result()
    copied = rest.copy_weights(weights, "archive", ttl_seconds=7200).result()
    copied_state = rest.copy_weights(state, "archive").result()
    assert copied.endswith("/sampler_weights/sampler")
    for path in (state, weights):
        rest.delete_checkpoint_from_tinker_path(path).result()
    again = service.create_sampling_client(model_path=copied).result().compute_logprobs(PROMPT).result()
    assert again == expected
    loaded = service.create_training_client_from_state_with_optimizer(copied_state).result()
    assert loaded.get_info().lora_rank == 4

    run = copied.removeprefix("tinker://").partition("/")[0]
    (shown,) = rest.list_checkpoints(run).result().checkpoints
    assert shown.size_bytes > 0
    assert 7000 < shown.expires_at.timestamp() - time.time() <= 7200
    assert run in {
        each.training_run_id for each in rest.list_training_runs(project_id="archive").result().training_runs
    }
    with pytest.raises(tinker.NotFoundError):
        rest.copy_weights(weights, "archive").result()
    with pytest.raises(tinker.APIError):
        loaded.load_state(weights).result()
