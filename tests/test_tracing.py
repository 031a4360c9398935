"""OpenTelemetry: one trace from a request to every attempt, at a real collector that speaks OTLP/HTTP; and nothing at all without one."""

from __future__ import annotations

import contextlib
import gzip
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from conftest import Running, environment, eventually
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from test_trail import TYPES, lines, post

from jobsys.settings import Settings

SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"


class Collector(ThreadingHTTPServer):
    """Takes traces; `spans` are those it got, each with its resource's attributes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Export)
        self.spans: list[Any] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}).start()

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Export(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        assert self.path == "/v1/traces"
        for of_resource in request.resource_spans:
            assert attributes(of_resource.resource)["service.name"] == "jobsys"
            for scope in of_resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with contextlib.closing(Collector()) as collector:
        yield collector


def test_a_trace_leads_from_the_caller_through_the_request_to_each_attempt(
    collector: Collector, start_web: Callable[..., Running], start_worker: Callable[..., Running], tmp_path: Any
) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "LOG_FILE": tmp_path / "log", **SOON, **TYPES}
    web = start_web(**env)
    worker = start_worker(**env)
    answer, request_id = post(f"{web.url}/jobs?token=hush", {"type": "LEADER"}, traceparent=f"00-{CALLER}-00f067aa0ba902b7-01")
    eventually(lambda: len(collector.named("process LEADER")) == 2 and len(collector.named("process follow")) == 2, timeout=20)

    (request,) = eventually(lambda: collector.named("POST /jobs"))
    (creation,) = collector.named("create LEADER")
    first, second = sorted(collector.named("process LEADER"), key=lambda span: span.start_time_unix_nano)
    assert request.parent_span_id.hex() == "00f067aa0ba902b7"
    assert creation.parent_span_id == request.span_id and first.parent_span_id == second.parent_span_id == creation.span_id
    assert [span.kind for span in (request, creation, first)] == [request.SPAN_KIND_SERVER, 4, 5]
    assert (
        attributes(request).items()
        >= {
            "http.request.method": "POST",
            "http.route": "/jobs",
            "http.response.status_code": 202,
            "url.path": "/jobs",
            "jobsys.request.id": request_id,
        }.items()
    )
    assert (
        attributes(second).items()
        >= {
            "messaging.system": "jobsys",
            "messaging.message.id": answer["jobId"],
            "messaging.destination.name": "default",
            "jobsys.job.type": "LEADER",
            "jobsys.job.attempt": 2,
            "jobsys.request.id": request_id,
        }.items()
    )
    assert first.status.code == 2 and first.status.message == "RuntimeError: not yet" and second.status.code == 0
    (event,) = first.events
    assert attributes(event)["exception.type"] == "RuntimeError" and "trail_types.py" in attributes(event)["exception.stacktrace"]
    # what the job led to
    (mail,) = eventually(lambda: collector.named("create EMAIL_SEND"))
    assert mail.parent_span_id == second.span_id
    assert {span.trace_id.hex() for span in collector.spans if "live" not in span.name} == {CALLER}
    assert "hush" not in str(collector.spans)
    traced = {(each["event"], each["trace_id"]) for each in lines(tmp_path / "log") if each.get("trace_id")}
    assert traced >= {("request", CALLER), ("attempt failed", CALLER), ("attempt succeeded", CALLER), ("at work", CALLER)}

    assert web.stop() == 0 and worker.stop() == 0
    assert "Failed to detach context" not in web.output + worker.output


def test_refused_requests_have_spans_too_and_the_last_are_sent_at_the_end(collector: Collector, start_web: Callable[..., Running]) -> None:
    web = start_web(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, WEB_PROCESSES=1, OTEL_BSP_SCHEDULE_DELAY="60000")
    for method, path in (("GET", "/nowhere?password=hush"), ("BREW", "/jobs"), ("POST", "/jobs")):
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(urllib.request.Request(web.url + path, method=method, data=b"{"), timeout=5)
    assert web.stop() == 0
    spans = {attributes(each)["http.response.status_code"]: each for each in collector.spans}
    assert spans[404].name == "GET" and "http.route" not in attributes(spans[404])
    assert spans[415].name == "POST /jobs" or spans[400].name == "POST /jobs"
    assert all(each.status.code == 0 for each in spans.values()) and "hush" not in str(collector.spans)


def test_a_collector_that_is_away_hurts_nobody(
    start_web: Callable[..., Running], start_worker: Callable[..., Running], system: Any, closed_port: int
) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{closed_port}", **SOON}
    web, worker = start_web(**env), start_worker(**env)
    answers = [post(f"{web.url}/jobs", {})[0] for _ in range(20)]
    assert all(system.wait(answer["jobId"], 10).status == "COMPLETED" for answer in answers)
    assert worker.stop(timeout=10) == 0 and web.stop(timeout=10) == 0


def test_settings_of_opentelemetry_that_make_no_sense_fail_no_request_and_no_job(
    collector: Collector, start_web: Callable[..., Running], start_worker: Callable[..., Running], system: Any
) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4096"}  # more than the queue holds
    web, worker = start_web(**env), start_worker(**env)
    answer, _ = post(f"{web.url}/jobs", {})
    assert system.wait(answer["jobId"], 10).status == "COMPLETED" and system.failures(answer["jobId"]) == []
    assert "this process makes no traces" in web.output and "this process makes no traces" in worker.output


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def test_without_the_packages_it_refuses_to_start_and_without_the_setting_it_asks_for_none(settings: Settings, tmp_path: Any) -> None:
    program = WITHOUT + "from jobsys.cli import main; sys.argv = ['jobsys', 'jobs']; main()"
    for endpoint, status in (("http://127.0.0.1:4318", 1), (None, 0)):
        env = environment(settings, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
        done = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert bool(done.returncode) == bool(status), done.stderr
        assert ("pip install 'jobsys[otel]', or unset it" in done.stderr) == bool(status) and "Traceback" not in done.stderr


def test_nothing_is_imported_unless_it_is_wanted(settings: Settings, tmp_path: Any) -> None:
    program = "import sys; from jobsys.app import create_app; create_app(); assert not [m for m in sys.modules if 'opentelemetry' in m]"
    subprocess.run([sys.executable, "-c", program], env=environment(settings), cwd=tmp_path, check=True, timeout=30)
