"""What /openapi.json says: that it is complete and sound, and of use. Whether it is true, test_schemathesis.py asks."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import falcon
import jsonschema
import openapi_spec_validator
import pytest
import webtest
from conftest import Running, environment, eventually
from pydantic import ConfigDict

from jobsys import Job, Payload, openapi
from jobsys.api import rate_limit
from jobsys.api.access import Access, needed
from jobsys.api.description import PAGES, Description
from jobsys.api.envelope import Router
from jobsys.app import create_app
from jobsys.job_types import JobType, Registry, registry
from jobsys.openapi import Answer, DescriptionError, describe
from jobsys.settings import Settings
from jobsys.system import JobSystem
from jobsys.tokens import SCOPES, Tokens

OPEN = Settings(_env_file=None, database_url="postgresql://127.0.0.1:1/none", job_modules=["example_types"])
USER, PASSWORD = "ada", "a secret that is nowhere else"
GUARDED = OPEN.model_copy(update={"admin_user": USER, "admin_pass": PASSWORD})
CLOSED = GUARDED.model_copy(update={"jwt_secret": "the secret key of these tests' tokens"})
OLDER = {"name": "sendEmail", "data": {"recipient": "ada@example.test", "subject": "Hello"}}


def app(settings: Settings) -> webtest.TestApp:
    return webtest.TestApp(create_app(system=JobSystem(settings)))


@pytest.fixture(scope="module")
def web() -> webtest.TestApp:
    """The application while its database is away: it describes itself all the same."""
    return app(OPEN)


@pytest.fixture(scope="module")
def document(web: webtest.TestApp) -> dict[str, Any]:
    return dict(web.get("/openapi.json", status=200).json)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method in item.keys() - {"parameters"}:
            yield method.upper(), path, item[method]


def wrong(document: dict[str, Any], name: str, value: Any) -> list[str]:
    """What is wrong with a value by one of the document's schemas."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]


@pytest.mark.parametrize("settings", [OPEN, GUARDED, CLOSED], ids=["open", "guarded", "closed"])
def test_the_document_is_openapi(settings: Settings) -> None:
    document = app(settings).get("/openapi.json").json
    openapi_spec_validator.validate(document)
    assert document["openapi"].startswith("3.1.") and document["servers"] == [{"url": "/"}]
    assert "secret" not in json.dumps(document)


def test_every_route_and_method_is_described_and_no_other(web: webtest.TestApp, document: dict[str, Any]) -> None:
    routes = {(method, path) for path, methods in web.app._router.responders.items() for method in methods if not path.startswith(PAGES)}
    assert {(method, path) for method, path, _ in operations(document)} == routes
    for path in document["paths"]:
        allowed = web.options(path.replace("{", "").replace("}", "")).headers["Allow"].split(", ")
        assert ({"GET", "HEAD"} <= set(allowed)) == ("get" in document["paths"][path])
        assert set(allowed) - {"HEAD", "OPTIONS"} == {method for method, each, _ in operations(document) if each == path}


def test_every_operation_says_what_it_does_and_what_can_go_wrong(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)
    tags = {tag["name"] for tag in document["tags"] if tag["description"]}
    for _, path, operation in operations(document):
        assert operation["summary"] and set(operation["tags"]) <= tags
        assert {"500", "431"} <= set(operation["responses"])
        assert ("404" in operation["responses"]) == ("{" in path)
        assert ("422" in operation["responses"]) == ("requestBody" in operation)


class Odd:
    """Responders whose descriptions are not to be had."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Say nothing of itself."""

    @describe("oddOne", {200: Answer("It leads nowhere.", links={"oddTwo": {"job_id": "$response.body#/id"}})})
    def on_get_link(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Lead nowhere."""

    @describe("oddOne", {200: Answer("It is called like another.")})
    def on_get_name(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Have another's name."""

    @describe("oddThree", {200: Answer("It fails strangely.")}, errors=[418])
    def on_get_error(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Fail strangely."""

    @describe("oddFour", {200: Answer("It is nowhere.")})
    def on_get_place(self, req: falcon.Request, resp: falcon.Response, planet: str) -> None:
        """Be somewhere."""

    @describe("oddFive", {200: Answer("It has no words.")})
    def on_get_mute(self, req: falcon.Request, resp: falcon.Response) -> None:
        pass


@pytest.mark.parametrize(
    ("routes", "complaint"),
    [
        ({"/odd": None}, "Odd.on_get has no description"),
        ({"/odd": "link"}, "oddOne links to oddTwo"),
        ({"/odd": "link", "/odder": "name"}, "the name oddOne is taken by Odd.on_get_link"),
        ({"/odd": "error"}, "nothing is said of the error 418"),
        ({"/odd/{planet}": "place"}, "nothing is said of planet"),
        ({"/odd": "mute"}, "Odd.on_get_mute has no docstring"),
    ],
)
def test_what_is_described_wrongly_or_not_at_all_is_refused(routes: dict[str, str | None], complaint: str) -> None:
    router = Router()
    for path, suffix in routes.items():
        router.add_route(path, Odd(), **({"suffix": suffix} if suffix else {}))
    with pytest.raises(DescriptionError, match=complaint):
        Description(JobSystem(OPEN), router, Access(OPEN, JobSystem(OPEN).database)).make()


def test_every_job_type_is_described_with_its_payload_and_example(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    shapes = [schemas[each["$ref"].rpartition("/")[2]] for each in schemas["JobSubmission"]["oneOf"]]
    assert sorted(shape["properties"]["type"]["const"] for shape in shapes) == sorted(registry.types)
    assert "LEDGER" in registry.types, "the user's own types are among them"
    examples = document["paths"]["/jobs"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for name, job_type in registry.types.items():
        assert examples[name]["value"] == {"type": name, "payload": job_type.example}
        assert job_type.example == {} or wrong(document, "JobSubmission", examples[name]["value"]) == []


def test_types_of_similar_names_have_schemas_of_their_own() -> None:
    names = openapi._type_names(SimpleNamespace(types=dict.fromkeys(["EMAIL_SEND", "EmailSend", "email.send", "v2"])))  # type: ignore[arg-type]
    assert names == {"EMAIL_SEND": "EmailSend", "EmailSend": "EmailSend2", "email.send": "EmailSend3", "v2": "V2"}


class Node(Payload):
    name: str
    children: list[Node] | None = None


class Strange(Payload):
    """Has a field that no schema can describe."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    where: SimpleNamespace | None = None


def test_a_payload_may_hold_itself_or_what_no_schema_can_say() -> None:
    def does_nothing(payload: Any, job: Job) -> None:
        """Do nothing."""

    system = JobSystem(OPEN)
    system.types = Registry()
    for name, payload in (("TREE", Node), ("STRANGE", Strange)):
        system.types.add(JobType(name, does_nothing, payload))
    document = webtest.TestApp(create_app(system=system)).get("/openapi.json", status=200).json
    openapi_spec_validator.validate(document)
    tree = {"name": "a", "children": [{"name": "b"}]}
    assert wrong(document, "JobSubmission", {"type": "TREE", "payload": tree}) == []
    assert wrong(document, "JobSubmission", {"type": "TREE", "payload": {"name": "a", "children": [{}]}})
    assert wrong(document, "JobSubmission", {"type": "TREE"})
    assert wrong(document, "JobSubmission", {"type": "STRANGE", "payload": {"where": 1}}) == []
    assert wrong(document, "JobSubmission", {"type": "STRANGE"}) == []


def test_older_clients_find_their_own_words(document: dict[str, Any]) -> None:
    assert wrong(document, "OlderJobSubmission", OLDER) == []
    assert wrong(document, "OlderJobSubmission", OLDER | {"data": {"to": "ada@example.test", "subject": "Hello"}})
    assert wrong(document, "JobSubmission", OLDER)
    body = document["paths"]["/api/jobs"]["post"]["requestBody"]["content"]["application/json"]
    assert [each["$ref"].rpartition("/")[2] for each in body["schema"]["anyOf"]] == ["JobSubmission", "OlderJobSubmission"]


@pytest.mark.parametrize(
    "body",
    [
        {"type": "NOPE"},
        {"type": "EMAIL_SEND"},
        {"type": "EMAIL_SEND", "payload": {"to": [], "subject": "Hello"}},
        {"payload": {"sleepMs": -1}},
        {"payload": {"note": "a\0b"}},
        {"payload": {"deep": [{"a\0b": 1}]}},
        {"payload": {"deep": [2**63]}},
        {"priority": "urgent"},
        {"delay": 1, "runAt": "2030-01-31T12:00:00Z"},
        {"tpye": "TEST_JOB"},
    ],
)
def test_what_the_server_refuses_the_schema_does_too(web: webtest.TestApp, document: dict[str, Any], body: dict[str, Any]) -> None:
    web.post_json("/jobs", body, status=422)
    assert wrong(document, "JobSubmission", body)


def test_who_has_the_document_need_not_fetch_it_again(web: webtest.TestApp) -> None:
    first = web.get("/openapi.json")
    again = web.get("/openapi.json", headers={"If-None-Match": first.headers["ETag"]}, status=304)
    assert again.body == b"" and again.headers["ETag"] == first.headers["ETag"]
    assert "no-store" not in first.headers["Cache-Control"]
    web.get("/openapi.json", headers={"If-None-Match": '"another"'}, status=200)


@pytest.mark.parametrize("settings", [OPEN, GUARDED, CLOSED, CLOSED.model_copy(update={"metrics_public": True})])
def test_credentials_are_asked_for_where_the_document_says_so(settings: Settings) -> None:
    """The database is away: who gets in finds that out, and who doesn't is told before."""
    web = app(settings)
    document = web.get("/openapi.json", status=200).json
    tokens = Tokens(CLOSED)
    asked = set()
    for method, path, operation in operations(document):
        here = path.replace("{", "").replace("}", "")
        ways = dict(each for way in operation["security"] for each in way.items())
        assert set(ways) <= set(document["components"].get("securitySchemes", {}))
        asked |= set(ways)
        answer = web.request(here, method=method, status="*")
        assert (answer.status_int == 401) == bool(ways), (method, path, answer.status)
        assert not ways or {"401", "403"} <= set(operation["responses"])
        schemes = {
            each.split()[0].lower() for each in answer.headers.getall("WWW-Authenticate") for each in each.split(", ") if " " in each
        }
        assert schemes == set(ways)
        for scope in SCOPES if "bearer" in ways else ():
            token = {"Authorization": f"Bearer {tokens.issue('ada', [scope], 600)[0]}"}
            refused = web.request(here, method=method, headers=token, status="*").status_int == 403
            assert refused == (scope not in (*ways["bearer"], "admin")), (method, path, scope)
        if ways:
            assert ways.get("bearer", [needed(method, path)]) == [needed(method, path)]
    assert asked == set(document["components"].get("securitySchemes", {}))


@pytest.mark.parametrize("limit", [(600, 60.0), (0, 60.0)])
def test_limited_routes_say_so(settings: Settings, limit: tuple[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "PATIENCE", 30.0)
    web = app(settings.model_copy(update={"rate_limit": limit}))
    for method, path, operation in operations(web.get("/openapi.json", status=200).json):
        answer = web.request(path.replace("{", "").replace("}", ""), method=method, status="*")
        response = operation["responses"][str(answer.status_int)]
        if "$ref" in response:
            response = web.get("/openapi.json").json["components"]["responses"][response["$ref"].rpartition("/")[2]]
        said, described = (
            {name.lower() for name in each if name.lower().startswith("ratelimit-")} for each in (answer.headers, response["headers"])
        )
        assert said == described, (method, path, answer.status)
        assert len(said) == (3 if limit[0] and not path.startswith(("/admin", "/health", "/metrics")) else 0)
        assert not said or "429" in operation["responses"]


def test_many_jobs_are_an_array_or_lines(document: dict[str, Any]) -> None:
    for path in ("/jobs/bulk", "/api/jobs/bulk"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        one = document["paths"][path.removesuffix("/bulk")]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(content) == {"application/json", "application/x-ndjson"}
        assert all(each["schema"]["items"] == one and each["schema"]["maxItems"] == 10_000 for each in content.values())


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ({"ids": ["x"]}, True),
        ({"ids": []}, False),
        ({"filter": {"status": "failed,DEAD", "type": "EMAIL_SEND"}}, True),
        ({"filter": {"status": ["FAILED", "dead"]}, "asOf": "2030-01-31T12:00:00Z"}, True),
        ({"filter": {}}, False),
        ({"filter": {"limit": "5"}}, False),
        ({"filter": {"status": "ODD"}}, False),
        ({"filter": {"status": "RUNNING"}}, False),
        ({"filter": {"type": ""}}, False),
        ({"all": True}, True),
        ({"all": False}, False),
        ({"all": True, "ids": ["x"]}, False),
        ({}, False),
    ],
)
def test_which_jobs_an_operator_means_is_described_as_it_is_read(
    web: webtest.TestApp, document: dict[str, Any], body: dict[str, Any], right: bool
) -> None:
    web.post_json("/admin/jobs/retry", body, status=503 if right else 422)
    shape = document["paths"]["/admin/jobs/retry"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = {**shape, "components": document["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid(body) == right


# Of use to people


def test_the_files_of_the_page_are_those_that_ship_and_no_others(web: webtest.TestApp) -> None:
    page = web.get("/docs", status=200)
    for element in page.html.select("script[src], link[href]"):
        file = web.get(element.get("src") or element["href"], status=200)
        web.get(file.request.path, headers={"If-None-Match": file.headers["ETag"]}, status=304)
    policy = dict(each.split(None, 1) for each in page.headers["Content-Security-Policy"].split("; "))
    assert policy["script-src"] == policy["style-src"] == "'self'" and policy["default-src"] == "'none'"
    for name in ("index.html", "..%2Fdescription.py", "nothing.js"):
        web.get(f"/docs/{name}", status=404)


@pytest.mark.browser
def test_in_a_browser_the_page_shows_every_operation_without_a_network(browser: Any, start_web: Callable[..., Running]) -> None:
    web = start_web()
    browser.get(f"{web.url}/docs")
    described = len(list(operations(app(OPEN).get("/openapi.json").json)))
    eventually(lambda: len(browser.find_elements("css selector", ".opblock")) == described, timeout=30)
    browser.execute_script("document.querySelector('#operations-jobs-submitJob .opblock-summary-control').click()")
    eventually(lambda: "CSV_EXPORT" in browser.find_element("css selector", "#operations-jobs-submitJob").text, timeout=30)
    for button in ("try-out__btn", "execute"):
        eventually(lambda: browser.find_elements("css selector", f"#operations-jobs-submitJob .{button}"))  # noqa: B023
        browser.execute_script("document.querySelector(`#operations-jobs-submitJob .${arguments[0]}`).click()", button)
    eventually(lambda: "Job accepted!" in browser.find_element("css selector", "#operations-jobs-submitJob").text, timeout=30)
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        ground = "return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]"
        eventually(lambda: (int(browser.execute_script(ground)) > 128) == (scheme == "light"))  # noqa: B023
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert asked and all(address.startswith((f"{web.url}/", "data:")) for address in asked)
    assert not browser.find_elements("css selector", ".authorize"), "nothing here asks for credentials"
    assert browser.get_log("browser") == []


# Of use to programs


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the generator needs Python 3.11")
def test_a_generated_client_works(
    start_web: Callable[..., Running],
    start_worker: Callable[..., Running],
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    web = start_web(WEB_PROCESSES=1)
    start_worker()
    config = tmp_path / "generator.yml"
    config.write_text("post_hooks: []\n")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--url", f"{web.url}/openapi.json", "--config", str(config)]
    command += ["--meta", "none", "--output-path", str(tmp_path / "jobsys_client")]
    made = subprocess.run(command, env=environment(settings), capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stdout + made.stderr
    # It makes no lines from many objects; an array it does.
    warnings = [line for line in (made.stdout + made.stderr).splitlines() if line.startswith(("WARNING", "Unsupported"))]
    assert set(warnings[1::2]) <= {"Unsupported content type application/x-ndjson"}, made.stdout + made.stderr

    monkeypatch.syspath_prepend(tmp_path)
    client = importlib.import_module("jobsys_client").Client(base_url=web.url)
    models = importlib.import_module("jobsys_client.models")

    def call(module: str, *arguments: Any, **named: Any) -> Any:
        return importlib.import_module(f"jobsys_client.api.{module}").sync(*arguments, client=client, **named)

    payload = models.TestJobPayload.from_dict({"progressSteps": 2, "note": "comes back"})
    accepted = call("jobs.submit_job", body=models.TestJobJob(payload=payload, priority="high"), idempotency_key="order 17")
    job = call("jobs.get_job", accepted.job_id, wait=20.0)
    assert (job.status, job.priority, job.result["note"]) == (models.JobObjectStatus.COMPLETED, "high", "comes back")
    assert job.finished_at >= job.created_at
    assert call("jobs.list_events", job.id).events[0].kind == "created"
    assert [each.id for each in call("jobs.list_jobs", status="COMPLETED").jobs] == [job.id]

    mail = models.EmailSendPayload(to="nobody", subject="Hello")
    problem = call("jobs.submit_job", body=models.EmailSendJob(type_="EMAIL_SEND", payload=mail))
    assert (problem.status, problem.errors[0].loc) == (422, ["payload", "to"])
    assert call("jobs.retry_job", job.id).status == 409

    created = call("ingestion.create_ingestion", body=models.IngestionRequest(ids=[1, 2, 3, 4])).data
    assert call("ingestion.get_ingestion", created.ingestion_id).data.total_batches == 2
