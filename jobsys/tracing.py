"""OpenTelemetry spans from a request to each attempt at its jobs, where OTEL_EXPORTER_OTLP_ENDPOINT is set; else nothing is even imported.

A request is a server span, below it the making of each job a producer span, and below that each attempt a consumer span, on whatever
machine; the context is kept with the job (see trail.py). Spans are sent in the background: when nobody takes them they are dropped. The
thread that sends begins with the first span, which is after any fork of gunicorn's.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from typing import Any

from jobsys import __version__, logs, trail
from jobsys.errors import JobStopped, SettingsError
from jobsys.outcomes import described
from jobsys.running import RunningJob
from jobsys.settings import Settings

PATIENCE = 2.0
"""Seconds that the end of a process waits for the last spans to be sent."""
EXPORT_TIMEOUT = 5.0
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
log = logs.get(__name__)

active: Tracing | None = None
"""What makes the spans of this process, if it makes any."""


def configure(settings: Settings) -> None:
    """Make spans in this process from here on, if the settings want them. Raises SettingsError when the packages for it are missing."""
    global active
    if settings.otel_exporter_otlp_endpoint is None or active is not None:
        return
    try:
        active = Tracing(settings.otel_exporter_otlp_endpoint)
    except ImportError:
        raise SettingsError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, and the packages of OpenTelemetry are not installed: "
            "pip install 'jobsys[otel]', or unset it"
        ) from None
    trail.add_trace = active.add_to


def close() -> None:
    """Send what there is, for as long as `PATIENCE` lets it; spans that end later are dropped."""
    if active is not None:
        active.close()


class Tracing:
    """Makes spans. Where the program has set up a tracer provider of its own, they are made there."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry import context, trace
        from opentelemetry.exporter.otlp.proto.http import trace_exporter
        from opentelemetry.sdk import resources
        from opentelemetry.sdk import trace as sdk
        from opentelemetry.sdk.trace import export
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._context, self._trace = context, trace
        self._exporter, self._resources, self._sdk, self._export = trace_exporter, resources, sdk, export
        self._propagator = TraceContextTextMapPropagator()
        self._endpoint = endpoint.rstrip("/") + "/v1/traces"
        self._lock = threading.Lock()
        self._tracer: Any = None
        self._own: Any = None

    def begin_request(self, req: Any) -> None:
        """The span of a request begins, below that of its caller if it names one, and is this thread's."""
        headers = {name: value for name in ("traceparent", "tracestate") if (value := req.get_header(name))}
        method = req.method if req.method in _METHODS else "_OTHER"
        attributes = {
            "http.request.method": method,
            "url.scheme": req.scheme,
            "url.path": req.path,
            "server.address": req.host,
            "server.port": req.port,
            "client.address": req.remote_addr or "",
            "user_agent.original": req.user_agent or "",
            "jobsys.request.id": req.context.id,
        }
        parent = self._propagator.extract(headers)
        span = self._start(method, self._trace.SpanKind.SERVER, attributes, parent)
        req.context.span = span, self._context.attach(self._trace.set_span_in_context(span, parent))
        trail.note(trace_id=self._trace.format_trace_id(span.get_span_context().trace_id))

    def end_request(self, req: Any, status: int) -> None:
        """It ends."""
        begun = getattr(req.context, "span", None)
        if begun is None:  # Falcon refused it before any middleware
            return
        span, token = begun
        self._context.detach(token)
        if req.uri_template is not None:
            span.update_name(f"{req.method} {req.uri_template}")
            span.set_attribute("http.route", req.uri_template)
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def add_to(self, options: dict[str, Any], job: tuple[str, str, str] | None) -> None:
        """Add to the options of a job what its attempts go on from: the span of making it when `job` (id, type, queue) is one alone, else
        the one at hand."""
        parent = None
        if not self._trace.get_current_span().get_span_context().is_valid and trail.attempt() is not None:
            parent = trail.attempt().trace  # a pipeline goes on when the attempt's span has ended
        if job is None:
            self._propagator.inject(options, parent)
            return
        span = self._start(f"create {job[1]}", self._trace.SpanKind.PRODUCER, _about(*job, "create"), parent)
        self._propagator.inject(options, self._trace.set_span_in_context(span))
        span.end()

    def attempt(self, running: RunningJob, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an attempt's function in a span of its own."""
        parent = self._propagator.extract(running.carried)
        about = _about(running.message_id, running.actor_name, running.queue_name, "process")
        attributes = {**about, "jobsys.job.attempt": running.attempt}
        if "request_id" in running.carried:
            attributes["jobsys.request.id"] = running.carried["request_id"]
        span = self._start(f"process {running.actor_name}", self._trace.SpanKind.CONSUMER, attributes, parent)
        running.trace = self._trace.set_span_in_context(span, parent)
        token = self._context.attach(running.trace)
        try:
            return running.attempt_call.call(function, *args, **kwargs)
        except BaseException as error:
            if isinstance(error, JobStopped) and running.job.stop_reason != "time limit":
                span.set_attribute("jobsys.job.stopped", running.job.stop_reason or error.reason)
            else:
                self._record(span, error)
            raise
        finally:
            self._context.detach(token)
            span.end()

    def close(self) -> None:
        """See the module's."""
        own, self._own = self._own, None
        if own is None:
            return
        ending = threading.Thread(target=own.shutdown, name="jobsys tracing end", daemon=True)
        try:
            ending.start()
        except RuntimeError:  # so late no thread can begin any more
            own.shutdown()
        else:
            ending.join(PATIENCE)

    def _record(self, span: Any, error: BaseException) -> None:
        failed = described(error)
        texts = {"exception.type": failed.type, "exception.message": failed.message, "exception.stacktrace": failed.traceback}
        span.add_event("exception", texts)
        span.set_attribute("error.type", failed.type)
        span.set_status(self._trace.StatusCode.ERROR, f"{failed.type}: {failed.message}"[:500])

    def _start(self, name: str, kind: Any, attributes: dict[str, Any], parent: Any = None) -> Any:
        if self._tracer is None:
            with self._lock:
                self._tracer = self._tracer or self._make_tracer()
        return self._tracer.start_span(name, context=parent, kind=kind, attributes=attributes)

    def _make_tracer(self) -> Any:
        try:
            return self._begin().get_tracer("jobsys", __version__)
        except Exception:  # what else OTEL_… says may make no sense: that is no reason to fail a request or a job
            log.exception("OpenTelemetry can't be set up; this process makes no traces")
            return self._trace.NoOpTracer()

    def _begin(self) -> Any:
        there = self._trace.get_tracer_provider()
        if not isinstance(there, self._trace.ProxyTracerProvider):
            return there
        resource = self._resources.Resource.create()
        if str(resource.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
            resource = resource.merge(self._resources.Resource({"service.name": "jobsys"}))
        self._own = self._sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = self._exporter.OTLPSpanExporter(endpoint=self._endpoint, timeout=EXPORT_TIMEOUT)
        self._own.add_span_processor(self._export.BatchSpanProcessor(exporter))
        self._trace.set_tracer_provider(self._own)  # what libraries do in a job's function belongs to the same trace
        atexit.register(self.close)
        return self._own


class RequestSpans:
    """The Falcon middleware that makes the spans of requests."""

    def process_request(self, req: Any, resp: Any) -> None:
        """Begin the span."""
        if active is not None:
            active.begin_request(req)

    def process_response(self, req: Any, resp: Any, resource: object, succeeded: bool) -> None:
        """End it."""
        if active is not None:
            active.end_request(req, resp.status_code)


def _about(job_id: str, job_type: str, queue: str, operation: str) -> dict[str, Any]:
    return {
        "messaging.system": "jobsys",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": queue,
        "messaging.message.id": job_id,
        "jobsys.job.type": job_type,
    }
