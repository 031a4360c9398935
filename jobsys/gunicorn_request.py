"""Requests of the usual kind, read and answered as gunicorn does it, in a quarter of its time.

Usual is what browsers, HTTP libraries and proxies send: HTTP/1.1, a plain path, each header once, a body whose length was said and which
has come. All else, be it rare or forged, is gunicorn's to judge: nothing is refused here. And so is everything where gunicorn was
configured otherwise than by default, in what matters here.
"""

from __future__ import annotations

import io
import os
import re
import time
from functools import lru_cache
from typing import Any

from gunicorn import util
from gunicorn.config import Config
from gunicorn.http import wsgi
from gunicorn.http.message import TOKEN_RE, HeaderPolicy

_LONGEST_LINE, _LONGEST_FIELDS = 4000, 8000
"""Bytes of a request's first line, and of its headers: a little less than what gunicorn takes of the one, and of a single one of these."""
_USUAL = re.compile(
    rb"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) (?=/(?!/))([\w.~!$&'()*+,;=:@%/-]+)(\?[\w.~!$&'()*+,;=:@%/?-]*)? HTTP/1\.1\r\n"
    rb"((?:[A-Za-z0-9-]+:[\t -~]*\r\n){0,60})\r\n"
)
_FOR_GUNICORN = frozenset(("EXPECT", "TRANSFER-ENCODING", "UPGRADE"))
_MATTERS = [
    *("accesslog", "casefold_http_method", "forwarder_headers", "header_map", "http2_cleartext", "is_ssl", "limit_request_field_size"),
    *("limit_request_fields", "limit_request_line", "logconfig", "logconfig_dict", "logconfig_json", "max_requests"),
    *("permit_obsolete_folding", "permit_unconventional_http_method", "permit_unconventional_http_version", "post_request"),
    *("pre_request", "protocol", "proxy_protocol", "strip_header_spaces", "syslog"),
]
"""Settings of gunicorn's that change what it makes of requests."""


class Request:
    """A request of the usual kind, with the attributes of gunicorn's that its Response and its handling of errors look at."""

    version = (1, 1)

    def __init__(self, method: str, path: str, query: str, headers: dict[str, str], scheme: str, body: bytes, rest: bytes) -> None:
        self.method, self.path, self.uri, self.query, self.scheme = method, path, path + query, query[1:], scheme
        self.headers = headers
        """By name, in capital letters."""
        self.body = io.BytesIO(body)
        self.rest = rest
        """What came after it."""

    def should_close(self) -> bool:
        """Whether its client wants no other on this connection."""
        return self.headers.get("CONNECTION", "").lower() == "close"


class Reader:
    """Reads requests as one gunicorn, configured by `cfg`, would."""

    def __init__(self, cfg: Any) -> None:
        default = Config()
        default.set("forwarder_headers", "")
        default.set("accesslog", None)
        self.reads = "SCRIPT_NAME" not in os.environ and all(getattr(cfg, name) == getattr(default, name) for name in _MATTERS)
        """Whether it reads any."""
        self._schemes: dict[str, str] = cfg.secure_scheme_headers
        self._environ = {**wsgi.base_environ(cfg), "wsgi.multithread": True, "SCRIPT_NAME": "", "SERVER_PROTOCOL": "HTTP/1.1"}

        @lru_cache(1000)
        def trusted(address: str) -> bool:
            policy: Any = HeaderPolicy()
            policy.cfg, policy.peer_addr = cfg, (address, 0)
            return bool(policy._peer_is_trusted_proxy())

        self._trusts = trusted

    def read(self, data: bytes, client: Any) -> Request | None:
        """The request at the beginning of `data`; None when gunicorn is to read it. Its body has come, or it is not of the usual kind."""
        match = _USUAL.match(data) if self.reads and isinstance(client, tuple) else None
        if match is None or match.start(4) > _LONGEST_LINE or match.end() - match.start(4) > _LONGEST_FIELDS:
            return None
        headers: dict[str, str] = {}
        for line in match[4].decode().split("\r\n"):
            name, colon, value = line.partition(":")
            name = name.upper()
            if name in headers or name in _FOR_GUNICORN:
                return None
            if colon:
                headers[name] = value.strip(" \t")
        scheme = "http"
        if said := headers.keys() & self._schemes.keys():
            name = said.pop()
            if said:
                return None
            if headers[name] == self._schemes[name] and self._trusts(client[0]):
                scheme = "https"
        length = headers.get("CONTENT-LENGTH", "0")
        end = match.end() + int(length) if length.isdigit() and len(length) < 10 else len(data) + 1
        wish = headers.get("CONNECTION", "keep-alive").lower()
        if end > len(data) or wish not in ("keep-alive", "close"):
            return None
        method, path, query = match[1].decode(), match[2].decode(), (match[3] or b"").decode()
        return Request(method, path, query, headers, scheme, data[match.end() : end], data[end:])

    def environ(self, request: Request, connection: Any) -> dict[str, Any]:
        """What PEP 3333 says that the application gets."""
        environ = {
            **self._environ,
            "wsgi.input": request.body,
            "wsgi.url_scheme": request.scheme,
            "gunicorn.socket": connection.sock,
            "REQUEST_METHOD": request.method,
            "RAW_URI": request.uri,
            "QUERY_STRING": request.query,
            "PATH_INFO": util.unquote_to_wsgi_str(request.path) if "%" in request.path else request.path,
            "REMOTE_ADDR": connection.client[0],
            "REMOTE_PORT": str(connection.client[1]),
            "SERVER_NAME": connection.server[0],
            "SERVER_PORT": str(connection.server[1]),
        }
        for name, value in request.headers.items():
            environ[_variable(name)] = value
        return environ


class Response(wsgi.Response):
    """gunicorn's answer, whose headers are checked all together."""

    def process_headers(self, headers: list[tuple[str, str]]) -> None:
        """Take the application's headers."""
        values = "".join([value for _, value in headers])
        if not wsgi.HEADER_VALUE_RE.fullmatch(values) or not all([_is_plain(name) for name, _ in headers]):
            super().process_headers(headers)
            return
        for name, value in headers:
            if name.lower() == "content-length":
                self.response_length = int(value)
            self.headers.append((name, value.strip(" \t")))

    def default_headers(self) -> list[str]:
        """The first line, and what every answer of gunicorn's has."""
        connection = "upgrade" if self.upgrade else "close" if self.should_close() else "keep-alive"
        coding = "Transfer-Encoding: chunked\r\n" if self.chunked else ""
        date = _date(int(time.time()))
        return [f"HTTP/1.1 {self.status}\r\nServer: {self.version}\r\nDate: {date}\r\nConnection: {connection}\r\n{coding}"]


@lru_cache(1000)
def _variable(header: str) -> str:
    return header.replace("-", "_") if header in ("CONTENT-TYPE", "CONTENT-LENGTH") else f"HTTP_{header.replace('-', '_')}"


@lru_cache(1000)
def _is_plain(name: str) -> bool:
    """Whether this is the name of a header that means nothing to gunicorn, but for the length."""
    return bool(TOKEN_RE.fullmatch(name)) and not util.is_hoppish(name)


@lru_cache(2)
def _date(second: int) -> str:
    return str(util.http_date(second))
