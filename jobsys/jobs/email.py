"""EMAIL_SEND: one mail by SMTP, built with the standard library's email package, to an envelope of checked addresses.

Once the server has accepted anyone, the job is done: sending again would reach them twice, so those it refused stand in the
result. When the connection is lost between the last line of the mail and the server's answer nobody knows, and the job is
retried; every attempt carries the same Message-ID, by which receivers tell.
"""

from __future__ import annotations

import re
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from email.message import EmailMessage
from email.policy import SMTP
from typing import Annotated, Any

import email_validator
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from jobsys import GiveUp, Job, Payload, job
from jobsys.jobs import settings
from jobsys.settings import Settings

CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 30.0
KEEP = 60.0
"""Seconds a connection may have been idle to be used again; most servers and firewalls bear with it longer."""
MAX_RECIPIENTS = 100
"""RFC 5321, 4.5.3.1.8: what every server has to accept in one mail."""

_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029"

# the library's way of accepting example.test and localhost: whether such a name has mail is for one's own server to say
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()


def _address(value: str) -> str:
    """The address as it goes on the wire, an international domain in ASCII. Raises ValueError."""
    if value.startswith("-"):
        raise ValueError(f'"{value[:100]}" is not an e-mail address: it begins with a dash, as the options of mail programs do')
    try:
        checked = email_validator.validate_email(value, allow_smtputf8=False, check_deliverability=False, globally_deliverable=False)
    except email_validator.EmailNotValidError as error:
        raise ValueError(f'"{value[:100]}" is not an e-mail address: {error}') from None
    return checked.ascii_email or checked.normalized


def _addresses(value: Any) -> list[str]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise ValueError("must be an e-mail address or a list of them")
    if len(listed) > MAX_RECIPIENTS:
        raise ValueError(f"names {len(listed)} addresses; a mail goes to at most {MAX_RECIPIENTS}")
    return [_address(each) for each in listed]


def _one_line(value: str) -> str:
    if re.search(f"[{_CONTROLS}]", value):
        raise ValueError("must be one line without control characters")
    return value


Address = Annotated[str, AfterValidator(_address), Field(json_schema_extra={"format": "email"})]
Addresses = Annotated[
    list[str], BeforeValidator(_addresses, json_schema_input_type=Address | Annotated[list[Address], Field(max_length=MAX_RECIPIENTS)])
]
Recipients = Annotated[
    list[str],
    BeforeValidator(_addresses, json_schema_input_type=Address | Annotated[list[Address], Field(min_length=1, max_length=MAX_RECIPIENTS)]),
    Field(min_length=1),
]
Line = Annotated[str, AfterValidator(_one_line), Field(json_schema_extra={"pattern": rf"^[^{_CONTROLS}]*$"})]


class Email(Payload):
    """The mail to send; its sender is MAIL_FROM."""

    to: Recipients = Field(description="An address, or a list.")
    subject: Line = Field(min_length=1, max_length=998)
    body: str = Field("", description="The text.")
    html: str | None = Field(None, description="The same as HTML, for readers that prefer it.")
    cc: Addresses | None = None
    bcc: Addresses | None = None
    reply_to: Address | None = Field(None, alias="replyTo")

    @property
    def recipients(self) -> list[str]:
        """Everyone it goes to, each once."""
        return list(dict.fromkeys([*self.to, *(self.cc or []), *(self.bcc or [])]))

    @model_validator(mode="after")
    def _bounded(self) -> Email:
        if len(self.recipients) > MAX_RECIPIENTS:
            raise ValueError(f"to, cc and bcc name {len(self.recipients)} addresses; a mail goes to at most {MAX_RECIPIENTS}")
        return self


@job(
    "EMAIL_SEND",
    time_limit="2m",
    max_share=0.5,
    trip_after=20,
    aliases=["sendEmail", "email"],
    example={"to": "ada@example.test", "subject": "Hello", "body": "It works."},
)
def send_email(payload: Email, job: Job) -> dict[str, Any]:
    """Send an e-mail by SMTP."""
    message = _message(payload, job)
    try:
        refused = _deliver(message, payload.recipients)
    except smtplib.SMTPRecipientsRefused as error:
        raise _failure(error.recipients.values()) from error
    except smtplib.SMTPResponseException as error:
        raise _failure([(error.smtp_code, error.smtp_error)]) from error
    for address, answer in refused.items():
        job.log(f"refused: {address}: {_text(answer)}")
    return {
        "messageId": message["Message-ID"],
        "accepted": [address for address in payload.recipients if address not in refused],
        "refused": {address: _text(answer) for address, answer in refused.items()},
    }


def _message(payload: Email, job: Job) -> EmailMessage:
    message = EmailMessage(policy=SMTP.clone(cte_type="7bit"))  # not every server takes 8-bit text
    message["From"] = settings().mail_from
    message["To"] = ", ".join(payload.to)
    if payload.cc:
        message["Cc"] = ", ".join(payload.cc)
    if payload.reply_to:
        message["Reply-To"] = payload.reply_to
    message["Subject"] = payload.subject
    message["Date"] = datetime.now(timezone.utc)
    message["Message-ID"] = f"<{job.id}@{message['From'].addresses[0].domain or 'localhost'}>"
    message["X-Job-Id"] = job.id
    if job.request_id is not None:
        message["X-Request-ID"] = job.request_id
    if payload.body or not payload.html:
        message.set_content(payload.body)
        if payload.html:
            message.add_alternative(payload.html, subtype="html")
    else:
        message.set_content(payload.html, subtype="html")
    return message


Answer = tuple[int, Any]
"""What a server said: a code, and bytes that are usually text."""


def _failure(answers: Iterable[Answer]) -> Exception:
    """GiveUp when every answer is a 5xx, which is final; else an exception that lets the job be retried."""
    answers = list(answers)
    text = "the mail server refused: " + "; ".join(dict.fromkeys(_text(answer) for answer in answers))
    # what smtplib makes up itself, a 500 for a line without end, comes as str
    final = all(500 <= code < 600 and isinstance(reply, bytes) for code, reply in answers)
    return GiveUp(text) if final else smtplib.SMTPException(text)


def _text(answer: Answer) -> str:
    code, reply = answer
    text = reply.decode("utf-8", errors="replace") if isinstance(reply, bytes) else str(reply)
    return f"{code} {''.join(each if each.isprintable() else ' ' for each in text[:500])}".strip()


class _Connection(smtplib.SMTP):
    """Knows whether it has begun to send a mail's text. Before that, the mail can be sent on another connection instead."""

    text_begun = False

    def data(self, msg: Any) -> tuple[int, bytes]:
        self.text_begun = True
        return super().data(msg)


class _TlsConnection(_Connection, smtplib.SMTP_SSL):
    pass


class _Kept(threading.local):
    """The connection a thread has kept from its last mail, for what settings, and since when."""

    connection: _Connection | None = None
    settings: Settings | None = None
    since = 0.0


_kept = _Kept()


def _deliver(message: EmailMessage, recipients: list[str]) -> dict[str, Answer]:
    """Hand the mail to the server; returns those it refused, when it accepted others. Raises OSError, of which smtplib's errors are."""
    connection = _take_kept()
    if connection is not None:
        try:
            return _send(connection, message, recipients)
        except smtplib.SMTPException as error:
            hung_up = isinstance(error, smtplib.SMTPServerDisconnected) or getattr(error, "smtp_code", None) == 421
            if connection.text_begun or not hung_up:
                raise
    return _send(_connect(), message, recipients)


def _send(connection: _Connection, message: EmailMessage, recipients: list[str]) -> dict[str, Answer]:
    """Send the mail and keep the connection, unless anything at all went wrong on it."""
    connection.text_begun = False
    try:
        # not send_message, which turns a line's "From " into ">From "
        refused = connection.sendmail(message["From"].addresses[0].addr_spec, recipients, message.as_bytes())
    except BaseException:
        connection.close()
        raise
    _kept.connection, _kept.settings, _kept.since = connection, settings(), time.monotonic()
    return refused


def _take_kept() -> _Connection | None:
    connection, _kept.connection = _kept.connection, None
    if connection is None or (_kept.settings is settings() and time.monotonic() - _kept.since < KEEP):
        return connection
    connection.close()
    return None


def _connect() -> _Connection:
    chosen = settings()
    host, port = chosen.smtp_host or "127.0.0.1", chosen.smtp_port
    try:
        if chosen.mail_tls == "tls":
            connection: _Connection = _TlsConnection(host, port, timeout=CONNECT_TIMEOUT, context=ssl.create_default_context())
        else:
            connection = _Connection(host, port, timeout=CONNECT_TIMEOUT)
    except (ConnectionRefusedError, TimeoutError, socket.gaierror) as error:
        raise type(error)(f"the mail server {host}:{port} (SMTP_HOST, SMTP_PORT) can't be reached: {error}") from error
    except ssl.SSLError as error:
        raise _untrusted(error) from error
    try:
        if chosen.mail_tls == "starttls":
            _start_tls(connection)
        if chosen.smtp_user:
            connection.login(chosen.smtp_user, chosen.smtp_password or "")
        if connection.sock is not None:
            connection.sock.settimeout(ANSWER_TIMEOUT)
    except BaseException:
        connection.close()
        raise
    return connection


def _start_tls(connection: _Connection) -> None:
    try:
        connection.starttls(context=ssl.create_default_context())
    except smtplib.SMTPNotSupportedError:
        # It has no TLS, or somebody on the way took the offer out of its answer.
        raise smtplib.SMTPNotSupportedError(
            f"the mail server {settings().smtp_host}:{settings().smtp_port} offers no STARTTLS, and nothing was sent: "
            "SMTP_TLS=tls is for a port where TLS comes first, SMTP_TLS=none for a server that is to be trusted without"
        ) from None
    except ssl.SSLError as error:
        raise _untrusted(error) from error


def _untrusted(error: ssl.SSLError) -> ssl.SSLError:
    where = f"the mail server {settings().smtp_host}:{settings().smtp_port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        own = "" if "match" in error.verify_message else "; SSL_CERT_FILE can name the file of an authority of your own"
        return type(error)(error.errno, f"the certificate of {where} is not valid: {error.verify_message.rstrip('.')}{own}")
    return type(error)(error.errno, f"{where} does not speak TLS as asked (SMTP_TLS={settings().mail_tls}): {error.reason or error}")
