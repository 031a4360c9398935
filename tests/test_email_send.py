"""EMAIL_SEND, against real SMTP servers: well-behaved ones (aiosmtpd) and one that says and does what a test tells it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import smtplib
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default as modern
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from aiosmtpd.smtp import SMTP, AuthResult

from jobsys import GiveUp, Job
from jobsys.errors import InvalidSubmission, SettingsError
from jobsys.job_types import registry
from jobsys.jobs import email, settings
from jobsys.settings import Settings

JOB_ID = "019aaaaa-0000-7000-8000-0000000e3a11"
HELLO = {"to": "ada@example.test", "subject": "Hello", "body": "It works."}

# made for these tests: a certificate of localhost, signed by itself, good until 2120
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgaVuQc3eKyZDZEdMZ
kTOkzjtD6WuiWZ3l7A6qtTqW0dOhRANCAATjhBu4ScTOITOLy9Y8uD5d3eqVYIrk
VtVWggzePGg4Dw62E0q0SjrFs4N//BCmQ3dJxPTxi6RN2pX5uL9hPIAl
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBdjCCAR2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABOOEG7hJxM4hM4vL
1jy4Pl3d6pVgiuRW1VaCDN48aDgPDrYTSrRKOsWzg3/8EKZDd0nE9PGLpE3alfm4
v2E8gCWjXjBcMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAPBgNVHRMBAf8E
BTADAQH/MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4EFgQUz4VkM0968i4Dh3/Mv7zn
834oNl8wCgYIKoZIzj0EAwIDRwAwRAIgSzV6mTNdELTLmanr6IknrighrMm3vfK2
9ILfVrVoM5ICIE0NwNuJWEGzPPgojXKOpqCHgwyiiXeSmNmq1J9MB7Hf
-----END CERTIFICATE-----
"""

# made for these tests: an authority, and a certificate of mail.example that it signed
AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBYDCCAQegAwIBAgIBATAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxqb2JzeXMg
dGVzdHMwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBcxFTATBgNV
BAMMDGpvYnN5cyB0ZXN0czBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABDgWOmVK
gZAQQ1ojNqFYPB2naQp71uVDqNScIpBCXvORSWh0Ln9L5NEa+ZFtt4Zi/0liNRVu
GM3pDDfuOl0Py1+jQjBAMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgEG
MB0GA1UdDgQWBBSAz3xsrMkwozJPg17/qlB1b2pTBDAKBggqhkjOPQQDAgNHADBE
AiBAM15fb6f3EWmDdCDESpHhUMU8it2oXA6VmDao6U/87wIgDDKKBeDeRgiad4qz
RbM1EJhvZph3sIlB0UGA9xbgodU=
-----END CERTIFICATE-----
"""
SIGNED = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgK2zd53vr0nGSnEPT
ucvxWcAvfd5JUBJuODCtS92f+M+hRANCAAQ1aCJw/vWc+AMxgb60T2Eg5ti5Piye
tRE6Sm8Cu362qopD6C+NrmK8hJMrCqRHX9XvjX1mWlmzdDvYXy01riz2
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBhDCCASugAwIBAgIBAjAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxqb2JzeXMg
dGVzdHMwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBcxFTATBgNV
BAMMDG1haWwuZXhhbXBsZTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABDVoInD+
9Zz4AzGBvrRPYSDm2Lk+LJ61ETpKbwK7fraqikPoL42uYryEkysKpEdf1e+NfWZa
WbN0O9hfLTWuLPajZjBkMAkGA1UdEwQCMAAwFwYDVR0RBBAwDoIMbWFpbC5leGFt
cGxlMB8GA1UdIwQYMBaAFIDPfGysyTCjMk+DXv+qUHVvalMEMB0GA1UdDgQWBBSw
epP4X3S2DCRIKcge8NnzHgCd6jAKBggqhkjOPQQDAgNHADBEAiAYpFF1rNBWjtT1
zB6V40TOFh0yL8PWK5GI8hdqWUsMnAIgUwTcpKYiaNFdScIqnzM+UZB8a15cGxxb
HZLIeavw4HM=
-----END CERTIFICATE-----
"""


class MailServer:
    """An aiosmtpd server on a free port. `answers` holds what it says next instead of yes, by "MAIL", "DATA" or recipient."""

    def __init__(self, tls: ssl.SSLContext | None = None, **options: Any) -> None:
        self.answers: dict[str, list[str]] = {}
        self.envelopes: list[Any] = []
        self.peers: list[Any] = []
        self.sessions: list[Any] = []
        self._loop = asyncio.new_event_loop()
        self._sessions: list[SMTP] = []
        self._server = self._loop.run_until_complete(
            self._loop.create_server(lambda: SMTP(self, loop=self._loop, **options), "127.0.0.1", 0, ssl=tls)
        )
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    @property
    def mails(self) -> list[EmailMessage]:
        return [message_from_bytes(envelope.content.replace(b"\r\n", b"\n"), policy=modern) for envelope in self.envelopes]

    def hang_up(self) -> None:
        """Close every connection, as a server does with idle ones."""
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result(5)

    def close(self) -> None:
        self.hang_up()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._server.close()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _hang_up(self) -> None:
        for session in self._sessions:
            if session.transport is not None:
                session.transport.close()
        await asyncio.sleep(0.02)

    async def handle_MAIL(self, server: SMTP, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        self._sessions.append(server)
        if self.answers.get("MAIL"):
            return self.answers["MAIL"].pop(0)
        envelope.mail_from = address
        return "250 OK"

    async def handle_RCPT(self, server: SMTP, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        if self.answers.get(address):
            return self.answers[address].pop(0)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Any, envelope: Any) -> str:
        if self.answers.get("DATA"):
            return self.answers["DATA"].pop(0)
        self.envelopes.append(envelope)
        self.peers.append(session.peer)
        self.sessions.append(session)
        return "250 OK"


class RawServer(socketserver.ThreadingTCPServer):
    """Speaks SMTP in the bytes that `says` holds by verb ("HI" is the greeting, "." the end of a mail); None hangs up, b"" is silence.

    A list holds what it says one time after another.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, **says: Any) -> None:
        self.says = says
        self.heard: list[str] = []
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), Conversation)
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}).start()

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class Conversation(socketserver.StreamRequestHandler):
    server: RawServer

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client may be gone first
            self.converse()

    def converse(self) -> None:
        if not self.say("HI", b"220 raw"):
            return
        for line in self.rfile:
            verb = line[:4].decode("latin-1").strip().upper()
            if not self.say(verb, b"354 go on" if verb == "DATA" else b"250 OK"):
                return
            if verb == "DATA":
                while next(self.rfile, b".\r\n") != b".\r\n":
                    pass
                if not self.say(".", b"250 OK"):
                    return

    def say(self, verb: str, otherwise: bytes) -> bool:
        self.server.heard.append(verb)
        reply = self.server.says.get(verb, otherwise)
        if isinstance(reply, list):
            reply = reply.pop(0) if reply else otherwise
        if reply == b"":
            self.server.closing.wait(10)
        if not reply:
            return False
        self.wfile.write(reply + b"\r\n")
        return True


Use = Callable[..., None]


@pytest.fixture(autouse=True)
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """`use(server, SMTP_TLS="tls", …)`: send through this server from now on, with these settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(email, "CONNECT_TIMEOUT", 2.0)
    monkeypatch.setattr(email, "ANSWER_TIMEOUT", 2.0)

    def use(server: Any, **environment: str) -> None:
        for name, value in {
            "SMTP_HOST": "127.0.0.1",
            "SMTP_PORT": str(server.port),
            "MAIL_FROM": "jobs@example.test",
            **environment,
        }.items():
            monkeypatch.setenv(name, value)
        settings.cache_clear()

    yield use
    if email._kept.connection is not None:
        email._kept.connection.close()
        email._kept.connection = None
    settings.cache_clear()


@pytest.fixture
def server(use: Use) -> Iterator[MailServer]:
    """A well-behaved mail server, in use."""
    with contextlib.closing(MailServer()) as server:
        use(server)
        yield server


@pytest.fixture
def raw(use: Use) -> Iterator[Callable[..., RawServer]]:
    """`raw(HI=b"421 busy", …)`: a server that says these things, in use."""
    with contextlib.ExitStack() as stack:

        def start(**says: Any) -> RawServer:
            server = stack.enter_context(contextlib.closing(RawServer(**says)))
            use(server)
            return server

        yield start


def send(job: Job | None = None, /, **payload: Any) -> dict[str, Any]:
    result: dict[str, Any] = registry.load().types["EMAIL_SEND"].run(json.dumps(payload or HELLO), job or Job(JOB_ID))
    return result


# --- what arrives


def test_a_mail_arrives_as_it_was_described(server: MailServer) -> None:
    result = send(
        to=["ada@example.test", "grace@example.test"],
        cc="cc@example.test",
        bcc=["bcc@example.test"],
        replyTo="answers@example.test",
        subject="Grüße 🎉",
        body="Schön,\nwie es läuft.\n",
        html="<p>Schön</p>",
    )
    everyone = ["ada@example.test", "grace@example.test", "cc@example.test", "bcc@example.test"]
    assert result == {"messageId": f"<{JOB_ID}@example.test>", "accepted": everyone, "refused": {}}
    assert server.envelopes[0].mail_from == "jobs@example.test"
    assert server.envelopes[0].rcpt_tos == everyone
    mail = server.mails[0]
    assert mail["From"] == "jobs@example.test" and mail["To"] == "ada@example.test, grace@example.test"
    assert mail["Cc"] == "cc@example.test" and mail["Reply-To"] == "answers@example.test" and mail["Subject"] == "Grüße 🎉"
    assert mail["Message-ID"] == f"<{JOB_ID}@example.test>" and mail["X-Job-Id"] == JOB_ID
    assert abs(parsedate_to_datetime(mail["Date"]).timestamp() - time.time()) < 60
    text, html = mail.get_body(("plain",)), mail.get_body(("html",))
    assert text is not None and text.get_content() == "Schön,\nwie es läuft.\n"
    assert html is not None and html.get_content().strip() == "<p>Schön</p>"


def test_hidden_recipients_stand_in_no_header(server: MailServer) -> None:
    send(**HELLO, bcc=["secret@example.test"])
    assert "secret@example.test" in server.envelopes[0].rcpt_tos and b"secret" not in server.envelopes[0].content


def test_the_message_id_is_the_same_in_every_attempt(server: MailServer) -> None:
    first, second = send(Job(JOB_ID, attempt=1)), send(Job(JOB_ID, attempt=2))
    assert first["messageId"] == second["messageId"] == server.mails[1]["Message-ID"]


def test_a_mail_may_have_no_body(server: MailServer) -> None:
    assert registry.load().find("sendEmail").name == registry.load().find("EMAIL").name == "EMAIL_SEND"
    send(to="ada@example.test", subject="Nothing to add")
    assert server.envelopes[0].rcpt_tos == ["ada@example.test"] and server.mails[0].get_content().strip() == ""


def test_a_mail_with_html_alone_has_no_empty_text_beside_it(server: MailServer) -> None:
    send(to="ada@example.test", subject="News", html="<b>News</b>")
    assert server.mails[0].get_content_type() == "text/html"


def test_someone_named_twice_gets_one_mail(server: MailServer) -> None:
    assert send(**{**HELLO, "cc": ["ada@example.test"], "bcc": "ada@example.test"})["accepted"] == ["ada@example.test"]
    assert server.envelopes[0].rcpt_tos == ["ada@example.test"]


@pytest.mark.parametrize(
    "body", ["one\n.\nMAIL FROM:<x@example.test>\n..\n", "a\n\nb", "x" * 5000, "Grüße", "Z\u00fcrich " * 500, "From here\n" * 3]
)
def test_a_body_arrives_unchanged_whatever_stands_in_it(server: MailServer, body: str) -> None:
    send(**{**HELLO, "body": body})
    assert len(server.envelopes) == 1
    assert server.mails[0].get_content().replace("\r\n", "\n").rstrip("\n") == body.rstrip("\n")
    assert max(map(len, server.envelopes[0].content.splitlines())) <= 998 and server.envelopes[0].content.isascii()


def test_long_names_are_folded_into_headers_that_still_hold_them(server: MailServer, use: Use) -> None:
    use(server, MAIL_FROM=f"The Job Server <jobs@{'d' * 60}.example.test>")
    to = [f"{'a' * 60}{n}@{'b' * 60}.{'c' * 60}.test" for n in range(20)]
    result = send(to=to, subject="S" * 900)
    assert server.envelopes[0].mail_from == f"jobs@{'d' * 60}.example.test"
    mail = server.mails[0]
    assert [each.addr_spec for each in mail["To"].addresses] == to and mail["Subject"] == "S" * 900
    assert mail["Message-ID"] == result["messageId"] == f"<{JOB_ID}@{'d' * 60}.example.test>"


def test_an_international_domain_goes_out_in_ascii(server: MailServer) -> None:
    send(**{**HELLO, "to": "ada@bücher.example"})
    assert server.envelopes[0].rcpt_tos == ["ada@xn--bcher-kva.example"] and server.mails[0]["To"] == "ada@xn--bcher-kva.example"


def test_without_smtp_host_this_machine_is_the_mail_server(server: MailServer, use: Use) -> None:
    use(server, SMTP_HOST="")
    send()
    assert len(server.envelopes) == 1


# --- what is refused at the door


@pytest.mark.parametrize(
    "address",
    [
        *("", "x", "@", "a@", "@example.test", "a b@example.test", "a@exa mple.test", "a@b@c.test", "a@[127.0.0.1]", "-oQ@example.test"),
        *("a@example.test,b@example.test", "a@example.test;b@example.test", "<a@example.test>,<b@example.test>"),
        *("Ada <a@example.test>", "<a@example.test>", '"a,b"@example.test', '"a@b.test"@example.test', "a@example.test (Ada)"),
        *("a@example.test\r\nBcc: b@example.test", "a@example.test\n", "\ra@example.test", "a@example.test\u2028", "a\t@example.test"),
        *(f"{'a' * 300}@example.test", f"a@{'b' * 64}.test", "jörg@example.test", "a@example..test", ".a@example.test"),
    ],
)
def test_what_is_no_single_address_is_refused_by_name(address: str) -> None:
    fields = ("to", "cc", "bcc", "replyTo")
    with pytest.raises(InvalidSubmission) as refusal:
        registry.load().types["EMAIL_SEND"].check({**HELLO, **dict.fromkeys(fields, address)})
    assert [error["loc"] for error in refusal.value.errors] == [["payload", field] for field in fields]


@pytest.mark.parametrize(
    ("wrong", "loc"),
    [
        ({"to": []}, ["to"]),
        ({"to": None}, ["to"]),
        ({"to": 5}, ["to"]),
        ({"to": {"a": 1}}, ["to"]),
        ({"to": ["ada@example.test", 5]}, ["to"]),
        ({"to": ["ada@example.test", "x"]}, ["to"]),
        ({"to": [["ada@example.test"]]}, ["to"]),
        ({"to": [f"a{n}@example.test" for n in range(101)]}, ["to"]),
        ({"to": [f"a{n}@example.test" for n in range(60)], "bcc": [f"b{n}@example.test" for n in range(60)]}, []),
        ({"subject": "two\r\nlines"}, ["subject"]),
        ({"subject": "two\nlines"}, ["subject"]),
        ({"subject": "sep\u2028arated"}, ["subject"]),
        ({"subject": "bell\a"}, ["subject"]),
        ({"subject": ""}, ["subject"]),
        ({"subject": "x" * 999}, ["subject"]),
        ({"subject": 5}, ["subject"]),
        ({"body": None}, ["body"]),
        ({"html": 5}, ["html"]),
        ({"replyTo": ["a@example.test"]}, ["replyTo"]),
        ({"from": "me@example.test"}, ["from"]),
        ({"attachments": ["/etc/passwd"]}, ["attachments"]),
        ({"recipient": "b@example.test"}, ["recipient"]),
    ],
)
def test_a_payload_that_is_no_mail_is_refused_by_name(wrong: dict[str, Any], loc: list[str]) -> None:
    with pytest.raises(InvalidSubmission) as refusal:
        registry.load().types["EMAIL_SEND"].check({**HELLO, **wrong})
    assert [error["loc"] for error in refusal.value.errors] == [["payload", *loc]]


@pytest.mark.parametrize("wrong", [{"to": []}, {"to": ["ada@example.test"] * 101}, {"subject": "a\nb"}, {"subject": "a\u2028b"}])
def test_the_schema_says_what_is_no_mail(wrong: dict[str, Any]) -> None:
    schema = email.Email.model_json_schema()
    jsonschema.validate(HELLO | {"cc": []}, schema)
    for refuse, error in ((jsonschema.validate, jsonschema.ValidationError), (lambda mail, _: email.Email(**mail), ValueError)):
        with pytest.raises(error):
            refuse(HELLO | wrong, schema)
    assert "email" in {each.get("format") for each in schema["properties"]["to"]["anyOf"]}


@pytest.mark.parametrize(
    "address", ["ada@example.test", "root@localhost", "a.b+c@example.org", "o'hara@x.example", "A@EXAMPLE.TEST", "ada@bücher.example"]
)
def test_plain_addresses_are_taken(address: str) -> None:
    registry.load().types["EMAIL_SEND"].check({**HELLO, "to": address, "cc": [], "bcc": None})


# --- connections


def test_a_connection_is_used_for_the_next_mail_too(server: MailServer) -> None:
    for _ in range(5):
        send()
    assert len(server.peers) == 5 and len(set(server.peers)) == 1


def test_every_thread_has_a_connection_of_its_own(server: MailServer) -> None:
    both_connected = threading.Barrier(2)

    def two_mails() -> None:
        send()
        both_connected.wait(5)
        send()
        assert email._kept.connection is not None
        email._kept.connection.close()

    threads = [threading.Thread(target=two_mails) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.peers) == 4 and len(set(server.peers)) == 2


def test_a_kept_connection_that_the_server_has_closed_is_replaced(server: MailServer) -> None:
    send()
    server.hang_up()
    send()
    assert len(set(server.peers)) == 2


def test_a_server_that_takes_no_more_mails_on_a_connection_gets_a_new_one(server: MailServer) -> None:
    send()
    server.answers["MAIL"] = ["421 too many mails on this connection"]
    send()
    assert len(set(server.peers)) == 2


def test_a_connection_is_not_used_again_after_long_idling_or_for_other_settings(
    server: MailServer, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    send()
    use(server)
    send()
    monkeypatch.setattr(email, "KEEP", 0.0)
    send()
    assert len(set(server.peers)) == 3


def test_a_connection_on_which_anything_failed_is_not_kept(server: MailServer) -> None:
    server.answers["DATA"] = ["451 later"]
    with pytest.raises(OSError):
        send()
    assert email._kept.connection is None
    send()
    assert len(server.envelopes) == 1


def test_a_mail_is_not_sent_again_in_the_same_attempt_once_its_text_was_on_the_way(raw: Callable[..., RawServer]) -> None:
    server = raw()
    send()
    server.says["."] = None
    with pytest.raises(OSError):
        send()
    assert server.heard.count(".") == 2 and server.heard.count("HI") == 1


# --- what a server may answer


@pytest.mark.parametrize("where", ["MAIL", "DATA", "ada@example.test"])
def test_a_5xx_answer_is_final_and_says_why(server: MailServer, where: str) -> None:
    server.answers[where] = ["550 5.7.1 not from you"]
    with pytest.raises(GiveUp, match=r"the mail server refused: 550 5\.7\.1 not from you"):
        send()


@pytest.mark.parametrize("where", ["MAIL", "DATA", "ada@example.test"])
@pytest.mark.parametrize("answer", ["451 4.7.1 try later", "421 4.3.2 closing"])
def test_a_4xx_answer_is_retried_and_says_why(server: MailServer, where: str, answer: str) -> None:
    server.answers[where] = [answer]
    with pytest.raises(OSError, match=answer):
        send()
    assert server.envelopes == []
    assert send()["refused"] == {}


def test_recipients_that_are_refused_while_another_is_accepted_are_reported(server: MailServer) -> None:
    server.answers = {"no@example.test": ["550 no such user"], "busy@example.test": ["452 mailbox full"]}
    job = Job(JOB_ID)
    result = send(job, **{**HELLO, "to": ["ada@example.test", "no@example.test"], "bcc": "busy@example.test"})
    assert result["accepted"] == ["ada@example.test"]
    assert result["refused"] == {"no@example.test": "550 no such user", "busy@example.test": "452 mailbox full"}
    assert job.lines == ["refused: no@example.test: 550 no such user", "refused: busy@example.test: 452 mailbox full"]


@pytest.mark.parametrize(("second", "error"), [("550 no such user", GiveUp), ("452 mailbox full", OSError)])
def test_when_all_are_refused_it_is_final_only_if_every_refusal_is(server: MailServer, second: str, error: type[Exception]) -> None:
    server.answers = {"a@example.test": ["550 no such user"], "b@example.test": [second]}
    with pytest.raises(error):
        send(**{**HELLO, "to": ["a@example.test", "b@example.test"]})


def test_a_greeting_decides_like_any_answer(raw: Callable[..., RawServer]) -> None:
    raw(HI=b"421 too busy")
    with pytest.raises(OSError, match="421 too busy"):
        send()
    raw(HI=b"554 no mail here")
    with pytest.raises(GiveUp, match="554 no mail here"):
        send()


@pytest.mark.parametrize("says", [{"HI": None}, {"EHLO": None, "HELO": None}, {"MAIL": None}, {"RCPT": None}, {"DATA": None}, {".": None}])
def test_a_lost_connection_is_retried(raw: Callable[..., RawServer], says: dict[str, None]) -> None:
    raw(**says)
    with pytest.raises(OSError):
        send()


@pytest.mark.parametrize(("verb", "limit"), [("HI", "CONNECT_TIMEOUT"), ("MAIL", "ANSWER_TIMEOUT"), (".", "ANSWER_TIMEOUT")])
def test_a_server_that_falls_silent_is_waited_for_only_so_long(
    raw: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch, verb: str, limit: str
) -> None:
    monkeypatch.setattr(email, limit, 0.2)
    raw(**{verb: b""})
    started = time.monotonic()
    with pytest.raises(OSError):
        send()
    assert time.monotonic() - started < 1.5


def test_a_server_that_is_not_there_is_retried(use: Use) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        use(SimpleNamespace(port=taken.getsockname()[1]))
        with pytest.raises(ConnectionRefusedError):
            send()


@pytest.mark.parametrize("noise", [b"\xff\xfe\x00garbage", b"HTTP/1.1 400 Bad Request", b"5" * 20_000, b""])
def test_a_server_that_speaks_no_smtp_is_retried(raw: Callable[..., RawServer], noise: bytes) -> None:
    raw(HI=noise or b"\r\n")
    with pytest.raises(OSError):
        send()


def test_an_answer_that_is_no_text_is_told_as_text(raw: Callable[..., RawServer]) -> None:
    raw(MAIL=b"550-first\x00\x1b[31m line\r\n550 \xff\xfe caf\xc3\xa9")
    with pytest.raises(GiveUp) as refusal:
        send()
    assert str(refusal.value) == "the mail server refused: 550 first  [31m line \ufffd\ufffd café"


def test_refusals_in_the_result_are_storable_text(raw: Callable[..., RawServer]) -> None:
    raw(RCPT=[b"250 OK", b"550 \xff\x00" + b"x" * 2000])
    refused = send(**{**HELLO, "to": ["a@example.test", "b@example.test"]})["refused"]["b@example.test"]
    assert refused.startswith("550 \ufffd x") and refused.isprintable() and len(refused) < 600


# --- TLS and login


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    (tmp_path / "certificate.pem").write_text(CERTIFICATE)
    return tmp_path / "certificate.pem"


@pytest.fixture(params=["tls", "starttls"])
def secure(request: pytest.FixtureRequest, certificate: Path) -> Iterator[tuple[MailServer, str]]:
    """A server with the certificate of localhost, and what SMTP_TLS it wants."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    options: dict[str, Any] = {"tls": context} if request.param == "tls" else {"tls_context": context, "require_starttls": True}
    with contextlib.closing(MailServer(**options)) as server:
        yield server, request.param


def test_a_mail_goes_over_tls_to_a_server_whose_certificate_is_trusted(
    secure: tuple[MailServer, str], use: Use, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, how = secure
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    use(server, SMTP_TLS=how, SMTP_HOST="localhost")
    send()
    send()
    assert len(server.envelopes) == 2 and len(set(server.peers)) == 1


def test_nothing_is_sent_to_a_server_whose_certificate_is_not_trusted(secure: tuple[MailServer, str], use: Use) -> None:
    server, how = secure
    use(server, SMTP_TLS=how, SMTP_HOST="localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        send()
    assert server.envelopes == []


def test_nothing_is_sent_in_the_clear_when_the_server_offers_no_starttls(server: MailServer, use: Use) -> None:
    use(server, SMTP_TLS="starttls")
    with pytest.raises(OSError, match=f"the mail server 127.0.0.1:{server.port} offers no STARTTLS, and nothing was sent"):
        send()
    assert server.envelopes == []


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """mail.example and any other name lead to this machine."""
    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **options: lookup("127.0.0.1", *rest, **options))


@pytest.fixture
def remote(tmp_path: Path, elsewhere: None) -> Iterator[MailServer]:
    """A server that offers STARTTLS with a certificate of mail.example, and takes mail without."""
    (tmp_path / "signed.pem").write_text(SIGNED)
    (tmp_path / "authority.pem").write_text(AUTHORITY)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "signed.pem")
    with contextlib.closing(MailServer(tls_context=context, authenticator=authenticate, auth_require_tls=True)) as server:
        yield server


def test_to_another_machine_mail_goes_over_tls_unless_said_otherwise(
    remote: MailServer, use: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(remote, SMTP_HOST="mail.example", SMTP_USER="mailer", SMTP_PASSWORD="right")
    with pytest.raises(
        ssl.SSLCertVerificationError, match=rf"mail\.example:{remote.port} is not valid: unable to get local issuer.+SSL_CERT_FILE"
    ):
        send()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    send()
    assert [bool(session.ssl) for session in remote.sessions] == [True]
    use(remote, SMTP_HOST="other.example")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"Hostname mismatch, certificate is not valid for 'other.example'$"):
        send()
    assert len(remote.envelopes) == 1


def test_who_takes_the_offer_of_tls_out_of_the_answer_gets_nothing(raw: Callable[..., RawServer], use: Use, elsewhere: None) -> None:
    server = raw(EHLO=b"250-mail.example\r\n250 AUTH PLAIN LOGIN")
    use(server, SMTP_HOST="mail.example", SMTP_USER="mailer", SMTP_PASSWORD="hush")
    with pytest.raises(smtplib.SMTPNotSupportedError, match="offers no STARTTLS, and nothing was sent"):
        send()
    assert not {"AUTH", "MAIL"} & set(server.heard)


@pytest.mark.parametrize("how", ["tls", "starttls"])
def test_a_server_that_does_not_speak_tls_is_named(raw: Callable[..., RawServer], use: Use, how: str) -> None:
    use(raw(EHLO=b"250-raw\r\n250 STARTTLS", STAR=b"220 go ahead\r\nno TLS at all"), SMTP_TLS=how)
    with pytest.raises(OSError, match=rf"the mail server 127\.0\.0\.1:\d+ does not speak TLS as asked \(SMTP_TLS={how}\)"):
        send()


@pytest.mark.parametrize(
    ("values", "how"),
    [
        ({}, "none"),
        ({"smtp_host": "127.0.0.1"}, "none"),
        ({"smtp_host": "localhost", "smtp_user": "bob", "smtp_tls": "none"}, "none"),
        ({"smtp_host": "::1"}, "none"),
        ({"smtp_host": "mail"}, "starttls"),
        ({"smtp_host": "10.0.0.1", "smtp_user": "bob"}, "starttls"),
        ({"smtp_host": "127.0.0.1", "smtp_tls": "starttls"}, "starttls"),
        ({"smtp_host": "mail.example", "smtp_tls": "none"}, "none"),
        ({"smtp_host": "mail.example", "smtp_tls": "TLS"}, "tls"),
    ],
)
def test_tls_is_the_default_for_any_server_but_this_machines(values: dict[str, str], how: str) -> None:
    assert Settings(_env_file=None, **values).mail_tls == how


def test_a_password_is_not_sent_to_another_machine_in_the_clear() -> None:
    with pytest.raises(SettingsError, match=r"^SMTP_TLS: `none` would send SMTP_PASSWORD to mail.example in the clear"):
        Settings(_env_file=None, smtp_host="mail.example", smtp_user="bob", smtp_password="hush", smtp_tls="none")


def authenticate(server: Any, session: Any, envelope: Any, mechanism: str, credentials: Any) -> AuthResult:
    right = (credentials.login, credentials.password) == (b"mailer", b"right")
    return AuthResult(success=right, handled=right)


@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
def test_the_user_logs_in_and_a_wrong_password_is_final(use: Use) -> None:
    with contextlib.closing(MailServer(authenticator=authenticate, auth_required=True, auth_require_tls=False)) as server:
        use(server, SMTP_USER="mailer", SMTP_PASSWORD="right")
        send()
        assert len(server.envelopes) == 1
        use(server, SMTP_USER="mailer", SMTP_PASSWORD="wrong")
        with pytest.raises(GiveUp, match="535") as refusal:
            send()
        assert "wrong" not in str(refusal.value)
