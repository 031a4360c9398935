"""The API described, as OpenAPI 3.1: made of the routes, of what stands beside each responder, and of the job types.

`describe` stands above a responder and says what can't be read from it; the summary is its docstring. `document` puts all of it together.
The shapes of bodies and answers are types, which mypy holds the responders to and pydantic turns into JSON Schema. Whatever is missing or
ambiguous is a DescriptionError, and a test makes the document: so no route goes undescribed.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import pydantic
from pydantic.json_schema import GenerateJsonSchema

import jobsys
from jobsys.errors import InvalidSubmission
from jobsys.job_types import PRIORITIES, JobType, Registry
from jobsys.system import LONGEST_DELAY

Schema = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])

NO_NUL = r"^[^\u0000]*$"
"""What PostgreSQL can store of a text, as a pattern."""
IDEMPOTENCY_KEY: Schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^[ -~]*$"}


def any_case(*words: str) -> str:
    """The pattern of these words in any case."""
    return f"^(?i:{'|'.join(words)})$"


PRIORITY: Schema = {"type": "string", "pattern": any_case(*PRIORITIES, "medium"), "examples": [*PRIORITIES]}
STORABLE_INTEGER: Schema = {"format": "int64", "minimum": -(2**63), "maximum": 2**63 - 1}


BEFORE = (401, 403, 414, 431)
"""Errors that are answered before a door adds any header."""


class DescriptionError(Exception):
    """The API can't be described: a responder lacks its description, or a description names what isn't there."""


@dataclass(frozen=True)
class Parameter:
    """A parameter, by default of the query string; or a header of an answer."""

    name: str
    schema: Schema
    text: str
    where: str = "query"


@dataclass(frozen=True)
class Answer:
    """A status's meaning, and what comes with it."""

    text: str
    shape: Any = None
    """A type or a schema; None for an answer without a body."""
    media_type: str = "application/json"
    also: Mapping[str, Any] = field(default_factory=dict)
    """Further media types, each with its shape."""
    headers: tuple[Parameter, ...] = ()
    links: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What can be asked next: an operation's name, and where in this answer its parameters are."""


class Operation(NamedTuple):
    """What was said of a responder; the fields are the arguments of `describe`."""

    name: str
    answers: Mapping[int, Answer]
    body: Any
    parameters: tuple[Parameter, ...]
    errors: tuple[int, ...]
    database: bool


def describe(
    name: str,
    answers: Mapping[int, Answer],
    *,
    body: Any = None,
    parameters: Iterable[Parameter] = (),
    errors: Iterable[int] = (),
    database: bool = True,
) -> Callable[[F], F]:
    """Describe a responder: the operation's name for programs, and what it answers.

    `body` is a type, a schema, a dict of both by media type, SUBMISSION or Submissions. Errors that follow from the rest go without saying:
    400 where there are parameters, 404 where the path names something, what a body can be refused for, 503 where the `database` is asked,
    and what the door before the route refuses (see Door). `errors` are the others.
    """

    def declare(responder: F) -> F:
        responder.operation = Operation(name, answers, body, tuple(parameters), tuple(errors), database)  # type: ignore[attr-defined]
        return responder

    return declare


SUBMISSION = object()
"""As the body of an operation: any of the registered types of job with its payload. Below /api also in the words of older clients."""


@dataclass(frozen=True)
class Submissions:
    """As the body of an operation: many of those, in an array or one a line."""

    most: int


class Door(NamedTuple):
    """What stands before a route, and is the same whatever the route does."""

    security: list[dict[str, list[str]]]
    """What opens it, as OpenAPI says it: one of these. Nothing where it stands open."""
    errors: frozenset[int]
    """What it refuses with."""
    headers: tuple[Parameter, ...]
    """What it adds to the answers of all that come through."""


class Routes(NamedTuple):
    """What a document is about, and what the operations have in common."""

    paths: Mapping[str, Mapping[str, Callable[..., Any]]]
    """Path templates, and their responders by method."""
    places: Mapping[str, Parameter]
    """What the path templates name."""
    doors: Callable[[str, str], Door]
    """What stands before a method of a path."""
    schemes: Mapping[str, Schema]
    """What the doors mean by the names in `security`."""
    problems: Callable[[str], Mapping[int, Answer]]
    """The errors of a path by status."""
    headers: tuple[Parameter, ...]
    """Those of every request that come back with every answer."""
    older_words: Mapping[str, Mapping[str, str]]
    """By job type, how older clients call fields of its payload."""


def document(routes: Routes, types: Registry, text: str) -> dict[str, Any]:
    """The OpenAPI document. Raises DescriptionError."""
    made = _Document(routes, types)
    paths = {path: made.path(path, responders) for path, responders in routes.paths.items()}
    made.check_links()
    shared = {header.name: _parameter(header) for header in routes.headers}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "jobsys",
            "version": jobsys.__version__,
            "summary": "A job server on one PostgreSQL.",
            "description": text,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": about} for name, about in made.tags.items()],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(made.schemas.items())),
            "responses": dict(sorted(made.responses.items())),
            "parameters": shared,
            "headers": {each.name: _header(each) for each in routes.headers} | made.headers,
            **({"securitySchemes": dict(routes.schemes)} if routes.schemes else {}),  # an empty one gets a button on the page
        },
    }


class _Document:
    """The parts of a document while it is made."""

    def __init__(self, routes: Routes, types: Registry) -> None:
        self._routes, self._types = routes, types
        self._type_names = _type_names(types)
        self._parameters: dict[str, set[str]] = {}
        self._links: list[tuple[str, str, Mapping[str, str]]] = []
        self._owners: dict[str, Callable[..., Any]] = {}
        self.schemas: dict[str, Schema] = {}
        self.responses: dict[str, Schema] = {}
        self.headers: dict[str, Schema] = {}
        self.tags: dict[str, str] = {}

    def path(self, path: str, responders: Mapping[str, Callable[..., Any]]) -> Schema:
        """The path item."""
        names = re.findall(r"{(\w+)}", path)
        if unknown := set(names) - set(self._routes.places):
            raise DescriptionError(f"{path}: nothing is said of {', '.join(sorted(unknown))}")
        item: Schema = {"parameters": [_ref("parameters", header.name) for header in self._routes.headers]}
        item["parameters"] += [{**_parameter(self._routes.places[name]), "required": True} for name in names]
        for method, responder in sorted(responders.items()):
            operation = getattr(responder, "operation", None)
            if operation is None:
                raise DescriptionError(f"{method} {path}: {responder.__qualname__} has no description; put @describe above it")
            item[method.lower()] = self._operation(path, names, responder, operation, self._routes.doors(method, path))
        return item

    def check_links(self) -> None:
        """Raise DescriptionError where a link leads nowhere."""
        for source, target, given in self._links:
            if not set(given) <= self._parameters.get(target, set()) or not given:
                raise DescriptionError(f"{source} links to {target} with {', '.join(given)}, which is no operation with such parameters")

    def _operation(self, path: str, names: list[str], responder: Callable[..., Any], operation: Operation, door: Door) -> Schema:
        name = self._name(path, responder, operation)
        about = " ".join((inspect.getdoc(responder) or "").split())
        if not about:
            raise DescriptionError(f"{responder.__qualname__} has no docstring")
        self._parameters[name] = {*names, *(each.name for each in operation.parameters)}
        problems = self._routes.problems(path)
        responses = {status: self._answer(name, answer, door.headers) for status, answer in operation.answers.items()}
        for status in _errors(names, operation, door):
            if status not in problems:
                raise DescriptionError(f"{name}: nothing is said of the error {status}")
            if status not in responses:
                responses[status] = self._problem(status, problems[status], () if status in BEFORE else door.headers)
        return {
            "operationId": name,
            "tags": [self._tag(responder)],
            "summary": about.partition(". ")[0].rstrip("."),
            **({"description": about} if ". " in about else {}),
            **({"parameters": [_parameter(each) for each in operation.parameters]} if operation.parameters else {}),
            **({"requestBody": self._body(path, operation.body)} if operation.body is not None else {}),
            "responses": {str(status): responses[status] for status in sorted(responses)},
            "security": door.security,
        }

    def _name(self, path: str, responder: Callable[..., Any], operation: Operation) -> str:
        function, name = getattr(responder, "__func__", responder), operation.name
        if self._owners.setdefault(name, function) is function and name not in self._parameters:
            return name
        other = path.split("/")[1] + name[0].upper() + name[1:]
        if self._owners[name] is not function or other in self._parameters:
            raise DescriptionError(f"{path}: the name {name} is taken by {self._owners[name].__qualname__}")
        return other

    def _tag(self, responder: Callable[..., Any]) -> str:
        module = sys.modules[responder.__module__]
        name = responder.__module__.rpartition(".")[2]
        self.tags.setdefault(name, (module.__doc__ or name).partition("\n\n")[0].replace("\n", " "))
        return name

    def _answer(self, source: str, answer: Answer, added: tuple[Parameter, ...]) -> Schema:
        made: Schema = {"description": answer.text}
        for header in added:
            self.headers[header.name] = _header(header)
        headers = {header.name: _ref("headers", header.name) for header in (*self._routes.headers, *added)}
        made["headers"] = headers | {header.name: _header(header) for header in answer.headers}
        shapes = {} if answer.shape is None else {answer.media_type: answer.shape, **answer.also}
        if shapes:
            made["content"] = {media_type: {"schema": self._schema(shape)} for media_type, shape in shapes.items()}
        if answer.links:
            made["links"] = {target: {"operationId": target, "parameters": dict(given)} for target, given in answer.links.items()}
            self._links += [(source, target, given) for target, given in answer.links.items()]
        return made

    def _problem(self, status: int, answer: Answer, added: tuple[Parameter, ...]) -> Schema:
        name = f"{answer.shape.__name__}{status}{'Counted' if added else ''}"
        if name not in self.responses:
            self.responses[name] = self._answer(name, answer, added)
        return _ref("responses", name)

    def _body(self, path: str, body: Any) -> Schema:
        if body is SUBMISSION or isinstance(body, Submissions):
            one = self._submission(older=path.startswith("/api/"))
            return {"required": True, "content": _many(one, body.most) if isinstance(body, Submissions) else {"application/json": one}}
        shapes = body if isinstance(body, dict) and "application/json" in body else {"application/json": body}
        return {"required": True, "content": {media_type: {"schema": self._schema(shape)} for media_type, shape in shapes.items()}}

    def _submission(self, older: bool) -> Schema:
        """A media type object: every type of job with its payload."""
        types, words = sorted(self._types.types.values(), key=lambda each: each.name), self._routes.older_words
        examples = {each.name: {"summary": each.summary, "value": {"type": each.name, "payload": each.example}} for each in types}
        shapes = [self._submission_of(each, "type", "payload") for each in types]
        self._add("JobSubmission", {"oneOf": shapes, "description": "A job to be done: its type, and what that type needs."})
        shape = _ref("schemas", "JobSubmission")
        if older:
            shapes = [self._submission_of(each, "name", "data") for each in types]
            about = "The same in the words of older clients: `name` is the type, `data` its payload."
            self._add("OlderJobSubmission", {"oneOf": shapes, "description": about})
            shape = {"anyOf": [shape, _ref("schemas", "OlderJobSubmission")]}
            examples |= {f"{each.name} of old": _older_example(each, words[each.name]) for each in types if each.name in words}
        return {"schema": shape, "examples": examples}

    def _submission_of(self, job_type: JobType, name: str, data: str) -> Schema:
        payload = self._payload(job_type, self._routes.older_words.get(job_type.name, {}) if name == "name" else {})
        words = [job_type.name] if name == "type" else [*job_type.aliases, job_type.name]
        only_test = job_type.name == "TEST_JOB"
        also = f" Also, and in any case: {', '.join(job_type.aliases)}." if job_type.aliases and name == "type" else ""
        schema: Schema = {
            "type": "object",
            "description": job_type.summary,
            "properties": {
                name: {"const": words[0]} if name == "type" else {"type": "string", "enum": words},
                "priority": {**PRIORITY, "description": f"When it takes its turn; {job_type.priority} unless given."},
                data: payload,
                "runAt": {
                    "type": "string",
                    "format": "date-time",
                    "pattern": r"^(19[7-9]\d|[2-8]\d{3}|9[0-8]\d\d|99[0-8]\d|999[0-7])-",
                    "description": "Not before this time, which has an offset from UTC or ends in Z.",
                },
                "delay": {
                    "type": "number",
                    "minimum": 0,
                    "maximum": LONGEST_DELAY,
                    "description": "Not before so many seconds have passed.",
                },
                "maxRetries": {"type": "integer", "minimum": 0, "maximum": 1000, "description": "Attempts after the first."},
                "idempotencyKey": {**IDEMPOTENCY_KEY, "description": "The same as the header Idempotency-Key."},
            },
            "required": [*([] if only_test else [name]), *([] if _is_payload(job_type, {}) else [data])],
            "not": {"required": ["runAt", "delay"]},
            "additionalProperties": False,
        }
        schema["properties"][name]["description"] = f"The type of the job{'; left out, it is this one' if only_test else ''}.{also}"
        component = f"{self._type_names[job_type.name]}{'Job' if name == 'type' else 'OlderJob'}"
        self._add(component, schema)
        return _ref("schemas", component)

    def _payload(self, job_type: JobType, words: Mapping[str, str]) -> Schema:
        name = f"{self._type_names[job_type.name]}{'OlderPayload' if words else 'Payload'}"
        try:
            schema = job_type.payload.model_json_schema(schema_generator=_Untitled, ref_template=f"#/components/schemas/{name}{{model}}")
        except pydantic.PydanticUserError:  # it has a field of a kind for which JSON Schema has no words
            schema = {"type": "object", "description": inspect.getdoc(job_type.payload) or job_type.summary}
        for each, definition in schema.pop("$defs", {}).items():
            self._add(name + each, self._storable(definition))
        if words:
            schema["properties"] = {words.get(each, each): about for each, about in schema["properties"].items()}
            schema["required"] = [words.get(each, each) for each in schema.get("required", [])]
        elif job_type.example:
            schema["examples"] = [job_type.example]
        self._add(name, self._storable(schema))
        return _ref("schemas", name)

    def _storable(self, schema: Any) -> Any:
        """The schema, less what no payload may hold, whatever its type says: NUL characters, and numbers beyond 64 bits."""
        if not isinstance(schema, dict):
            return schema
        made = dict(schema)
        for word in ("properties", "patternProperties"):
            if word in made:
                made[word] = {name: self._storable(each) for name, each in made[word].items()}
        for word in ("anyOf", "oneOf", "allOf", "prefixItems"):
            if word in made:
                made[word] = [self._storable(each) for each in made[word]]
        for word in ("items", "additionalProperties"):
            if made.get(word) is True:
                made[word] = {}
            if word in made:
                made[word] = self._storable(made[word])
        kind = made.get("type")
        if kind == "string" and not {"pattern", "enum", "const", "format"} & set(made):
            made["pattern"] = NO_NUL
        elif kind in ("integer", "number"):
            made = {**STORABLE_INTEGER, **made} if kind == "integer" else made
        elif kind == "object" and made.get("additionalProperties") is not False:
            made.setdefault("propertyNames", {"pattern": NO_NUL})
        elif kind == "array":
            made.setdefault("items", self._any())
        elif not {"type", "$ref", "anyOf", "oneOf", "allOf", "const", "enum"} & set(made):
            made |= self._any()
        return made

    def _any(self) -> Schema:
        """The schema of a value that may be anything."""
        ref = _ref("schemas", "AnyValue")
        self._add(
            "AnyValue",
            {
                "description": "Any JSON that can be kept: texts without U+0000, numbers of 64 bits, nested at most 32 deep with the body.",
                "minimum": -(2**63),
                "maximum": 2**63 - 1,
                "pattern": NO_NUL,
                "items": ref,
                "propertyNames": {"pattern": NO_NUL},
                "additionalProperties": ref,
            },
        )
        return ref

    def _schema(self, shape: Any) -> Schema:
        if isinstance(shape, dict):
            return shape
        schema = pydantic.TypeAdapter(shape).json_schema(schema_generator=_Untitled, ref_template="#/components/schemas/{model}")
        for name, definition in schema.pop("$defs", {}).items():
            self._add(name, definition)
        if "$ref" in schema or not isinstance(shape, type) or "properties" not in schema:
            return schema
        self._add(shape.__name__, schema)
        return _ref("schemas", shape.__name__)

    def _add(self, name: str, schema: Schema) -> None:
        schema.pop("title", None)  # programs that write clients would take it for the name
        if self.schemas.setdefault(name, schema) != schema:
            raise DescriptionError(f"two different schemas are called {name}")


class _Untitled(GenerateJsonSchema):
    """pydantic's, without the titles that only repeat a field's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _type_names(types: Registry) -> dict[str, str]:
    """The names of the job types as those of schemas: EmailSend for EMAIL_SEND, each different."""
    names: dict[str, str] = {}
    for each in sorted(types.types):
        words = (word if word != word.upper() else word.capitalize() for word in re.split(r"[._-]+", each))
        name = "".join(word[:1].upper() + word[1:] for word in words)
        names[each] = next(free for n in range(1, len(types.types) + 2) if (free := f"{name}{n if n > 1 else ''}") not in names.values())
    return names


def _is_payload(job_type: JobType, value: Any) -> bool:
    try:
        job_type.check(value)
    except InvalidSubmission:
        return False
    return True


def _errors(names: list[str], operation: Operation, door: Door) -> list[int]:
    found = {431, 500, *operation.errors, *door.errors}
    found |= {400} if operation.parameters else set()
    found |= {414} if operation.parameters or names else set()
    found |= {404} if names else set()
    found |= {400, 408, 413, 415, 422} if operation.body is not None else set()
    found |= {503} if operation.database else set()
    return sorted(found)


def _many(one: Schema, most: int) -> Schema:
    """The content of a body of many, given the media type object of one."""
    array = {"type": "array", "items": one["schema"], "minItems": 1, "maxItems": most}
    examples = {"two": {"summary": "Two jobs.", "value": [each["value"] for each in one["examples"].values()][:2]}}
    lines = {**array, "description": "Each item in a line of its own."}
    return {"application/json": {"schema": array, "examples": examples}, "application/x-ndjson": {"schema": lines}}


def _older_example(job_type: JobType, words: Mapping[str, str]) -> Schema:
    data = {words.get(field, field): value for field, value in job_type.example.items()}
    return {"summary": job_type.summary, "value": {"name": job_type.aliases[0], "data": data}}


def _ref(kind: str, name: str) -> Schema:
    return {"$ref": f"#/components/{kind}/{name}"}


def _parameter(parameter: Parameter) -> Schema:
    return {"name": parameter.name, "in": parameter.where, "description": parameter.text, "schema": parameter.schema}


def _header(header: Parameter) -> Schema:
    return {"description": header.text, "schema": header.schema}
