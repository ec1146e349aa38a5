"""Traces of operations, as a collector gets them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("opentelemetry.sdk")

from conformance.server_process import ServerProcess, Wire
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

ServerMaker = Callable[..., ServerProcess]
_TRACE, _CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Keeps the spans that are sent to it, over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    named = {each.key: each.value.string_value for each in resource.resource.attributes}
                    collector.services.add(named["service.name"])
                    collector.spans.extend(span for scope in resource.scope_spans for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def _datum(target: int) -> dict[str, object]:
    tensors = {
        "target_tokens": {"data": [2, target], "dtype": "int64", "shape": [2]},
        "weights": {"data": [1.0, 1.0], "dtype": "float32", "shape": [2]},
    }
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        "loss_fn_inputs": tensors,
    }


def test_a_collector_gets_each_operation_as_part_of_its_client_s_trace(
    make_server: ServerMaker, collector: Collector
) -> None:
    server = make_server("--otlp-endpoint", collector.url).start()
    wire = Wire(server.url, None)
    model = wire.model()
    for seq_id, target, headers in ((1, 3, {"traceparent": f"00-{_TRACE}-{_CALLER}-01"}), (2, 3, {})):
        submitted = wire.http.post(
            "/api/v1/forward_backward",
            headers=headers,
            json={
                "model_id": model,
                "seq_id": seq_id,
                "forward_backward_input": {"data": [_datum(target)], "loss_fn": "cross_entropy"},
            },
        )
        wire.result(submitted)
    wire.http.post("/api/v1/optim_step", json={"model_id": model, "seq_id": 9, "adam_params": {}})
    assert server.stop() == 0
    assert collector.services == {"tinsmith"}
    passes = [span for span in collector.spans if span.name == "forward_backward"]
    traced, alone = sorted(passes, key=lambda span: span.start_time_unix_nano)
    assert (traced.trace_id.hex(), traced.parent_span_id.hex()) == (_TRACE, _CALLER)
    assert alone.trace_id != traced.trace_id
    assert not alone.parent_span_id
    for span in passes:
        below = [each for each in collector.spans if each.parent_span_id == span.span_id]
        waiting, on_device = sorted(below, key=lambda each: each.start_time_unix_nano)
        assert (waiting.name, on_device.name) == ("waiting", "on the device")
        assert span.start_time_unix_nano == waiting.start_time_unix_nano
        assert waiting.end_time_unix_nano == on_device.start_time_unix_nano
        assert span.end_time_unix_nano == on_device.end_time_unix_nano
        values = {each.key: each.value for each in span.attributes}
        assert values["tinsmith.model_id"].string_value == model
        assert values["tinsmith.tokens.trained"].int_value == 2
        assert span.status.code == Status.STATUS_CODE_UNSET
    (created,) = [span for span in collector.spans if span.name == "create_model"]
    assert created.end_time_unix_nano <= traced.start_time_unix_nano


def test_a_collector_that_is_not_there_holds_up_nothing(make_server: ServerMaker) -> None:
    server = make_server("--otlp-endpoint", "http://127.0.0.1:9").start()
    Wire(server.url, None).model()
    assert server.stop() == 0
