"""Every public method of the SDK's clients has a test; the table in docs/compatibility.md.

The table is compared with the SDK and with the tests that it names: a method that is not in it, or that its
test does not call, fails.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import tinker

ACCOUNTS = {
    "test_sdk_accounts.py::test_usage": "get_billing_usage get_billing_usage_async",
    "test_sdk_accounts.py::test_storage": "get_current_checkpoint_storage_usage "
    "get_current_checkpoint_storage_usage_async",
    "test_sdk_accounts.py::test_audit_log": "get_audit_log get_audit_log_async",
}
# The test that calls each method; those without a file are in test_sdk_clients.py. `holder` is a property.
CALLED: dict[type, dict[str, str]] = {
    tinker.ServiceClient: {
        "test_service_client": "create_lora_training_client create_lora_training_client_async "
        "create_rest_client create_sampling_client create_sampling_client_async "
        "create_training_client_from_state create_training_client_from_state_async "
        "create_training_client_from_state_with_optimizer "
        "create_training_client_from_state_with_optimizer_async copy_weights create_custom_loss "
        "get_server_capabilities get_server_capabilities_async get_telemetry close",
        "test_sdk_accounts.py::test_console_urls_are_the_vendors": "get_console_url",
    },
    tinker.TrainingClient: {
        "test_training_client": "forward forward_backward forward_backward_custom optim_step get_info "
        "get_tokenizer get_telemetry save_state load_state load_state_with_optimizer create_sampling_client "
        "save_weights_for_sampler save_weights_external save_weights_and_get_sampling_client",
        "test_training_client_async": "forward_async forward_backward_async forward_backward_custom_async "
        "optim_step_async get_info_async save_state_async load_state_async load_state_with_optimizer_async "
        "create_sampling_client_async save_weights_for_sampler_async save_weights_external_async "
        "save_weights_and_get_sampling_client_async",
        "test_sdk_accounts.py::test_console_urls_are_the_vendors": "get_console_url",
    },
    tinker.SamplingClient: {
        "test_sampling_client": "create sample sample_async compute_logprobs compute_logprobs_async "
        "get_base_model get_base_model_async get_sampler_handle from_sampler_handle get_telemetry "
        "on_queue_state_change",
        "test_sdk_accounts.py::test_a_sampler_s_tokenizer": "get_tokenizer",
    },
    tinker.RestClient: {
        "test_rest_client": "get_server_capabilities get_telemetry list_training_runs "
        "list_training_runs_async get_training_run get_training_run_async get_training_run_by_tinker_path "
        "get_training_run_by_tinker_path_async get_weights_info_by_tinker_path list_checkpoints "
        "list_checkpoints_async list_user_checkpoints list_user_checkpoints_async list_sessions "
        "list_sessions_async get_session get_session_async get_sampler get_sampler_async "
        "assign_session_project assign_session_project_async",
        "test_rest_client_changes_checkpoints": "publish_checkpoint_from_tinker_path "
        "publish_checkpoint_from_tinker_path_async unpublish_checkpoint_from_tinker_path "
        "unpublish_checkpoint_from_tinker_path_async set_checkpoint_ttl_from_tinker_path "
        "set_checkpoint_ttl_from_tinker_path_async get_external_weights_urls "
        "get_external_weights_urls_async copy_weights copy_weights_async delete_checkpoint "
        "delete_checkpoint_async delete_checkpoint_from_tinker_path "
        "delete_checkpoint_from_tinker_path_async",
        "test_sdk_sessions.py::test_sessions_are_found_by_what_is_known_of_them": "search_sessions",
        "test_sdk_accounts.py::test_session_trace": "export_session_trace export_session_trace_async",
        "test_sdk_accounts.py::test_keys_exchanged_for_tokens": "whoami",
    }
    | ACCOUNTS,
    tinker.AdminClient: {"test_rest_client": "get_telemetry"} | ACCOUNTS,
}


def public(client: type) -> set[str]:
    members = inspect.getmembers(client, callable)
    return {name for name, _ in members if not name.startswith("_")}


def table() -> str:
    """As docs/compatibility.md has it."""
    rows = []
    for client, tests in CALLED.items():
        by_method = {name: test for test, names in tests.items() for name in names.split()}
        for name in sorted(by_method):
            test = by_method[name]
            path = test if "::" in test else f"test_sdk_clients.py::{test}"
            rows.append(f"| `{client.__name__}.{name}` | `conformance/{path}` |")
    every = sum(len(public(client)) for client in CALLED)
    head = f"{len(rows)} of {every} methods are served.\n\n| Method | Test |\n|---|---|\n"
    return head + "\n".join(rows) + "\n"


def test_the_table_has_every_public_method() -> None:
    clients = {getattr(tinker, name) for name in dir(tinker) if re.fullmatch(r"[A-Z]\w+Client", name)}
    assert set(CALLED) == clients
    for client, tests in CALLED.items():
        called = [name for names in tests.values() for name in names.split()]
        assert sorted(called) == sorted(public(client)), client
        for test, names in tests.items():
            file, _, function = test.rpartition("::")
            module = importlib.import_module(f"conformance.{file.removesuffix('.py') or 'test_sdk_clients'}")
            source = inspect.getsource(getattr(module, function))
            for name in names.split():
                assert re.search(rf"\.{name}\(", source), f"{test} does not call {client.__name__}.{name}"
    documented = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    assert table() in documented, f"docs/compatibility.md: the table is now\n{table()}"
