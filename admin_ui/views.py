"""The pages and the buttons. A page is a GET; a button is a POST with a token that changes one thing and redirects.

Whatever goes wrong in one is answered with a page too; `page` is the one place that translates. (Who is not let in, by
jobsys/api/access.py, is told so as everywhere: in JSON.)
"""

from __future__ import annotations

import functools
import json
import logging
import re
import shlex
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import falcon

from admin_ui import job_view, reasons
from admin_ui.addresses import FILTERS, HOME, address, return_address
from admin_ui.forms import Tokens, read_form
from admin_ui.pages import REFRESH, Pages
from admin_ui.wording import plural
from jobsys import verbs
from jobsys.errors import DatabaseUnavailable, InvalidSubmission, JobNotFound, WrongState
from jobsys.system import STATUSES

if TYPE_CHECKING:
    from jobsys.system import JobSystem

JOBS_SHOWN = 50
BROKEN_SHOWN = 10
EVENTS_SHOWN = 200
PATIENCE = 15.0
"""Seconds a button may take that does something to many jobs, before it says that there are more."""

log = logging.getLogger(__name__)


class Refused(Exception):
    """What is answered with a page of its own: a status, a title, a text."""

    def __init__(self, status: str, title: str, text: str) -> None:
        self.status, self.title, self.text = status, title, text
        super().__init__(title)


def page(responder: Callable[..., None]) -> Callable[..., None]:
    """Turn what a responder raises into a calm page with the right status."""

    @functools.wraps(responder)
    def answer(ui: AdminUI, req: falcon.Request, resp: falcon.Response, **params: str) -> None:
        try:
            responder(ui, req, resp, **params)
        except JobNotFound:
            days = ui.system.settings.retention_days
            gone = f" Finished jobs are removed after {plural(days, 'day')}." if days else ""
            ui.trouble(req, resp, falcon.HTTP_404, "There is no such job", f"Its id is mistyped, or it was removed.{gone}")
        except WrongState as error:
            ui.trouble(
                req, resp, falcon.HTTP_409, f"The job is {error.status} now", f"Nothing was changed: {error}.", job_id=params["job_id"]
            )
        except InvalidSubmission as error:
            ui.trouble(req, resp, falcon.HTTP_400, "That can't be looked up", f"{error}.")
        except Refused as refusal:
            ui.trouble(req, resp, refusal.status, refusal.title, refusal.text)
        except DatabaseUnavailable:
            ui.unavailable(req, resp)
        except Exception:
            log.exception("a page could not be made: %s %s", req.method, req.path)
            ui.trouble(req, resp, falcon.HTTP_500, "This page could not be made", "That is a defect of jobsys; its log says more.")

    return answer


class AdminUI:
    """The Falcon resource of every page. Made once per app; `folder` has its templates and static files."""

    def __init__(self, system: JobSystem, folder: Path) -> None:
        self.system = system
        self._tokens = Tokens(system.settings)
        self._pages = Pages(folder)

    def on_get_dashboard(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The address people guess."""
        _redirect(resp, HOME, status=falcon.HTTP_302)

    @page
    def on_get_overview(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Counts, what broke, queues and workers."""
        now = datetime.now(timezone.utc)
        counts, queues, workers = self.system.counts(), self.system.queues(), self.system.workers()
        notices = reasons.notices(queues, workers, now)
        broken = counts["FAILED"] + counts["DEAD"]
        lines = [job_view.line(job) for job in self.system.jobs(status=("FAILED", "DEAD"), limit=BROKEN_SHOWN).jobs] if broken else []
        headline = reasons.headline(counts, notices)
        self._show(
            req,
            resp,
            "overview",
            poll=HOME,
            now=now,
            title=headline,
            headline=headline,
            notices=notices,
            counts=[(status, counts[status]) for status in STATUSES],
            links={status: address("jobs", status=status) for status in STATUSES},
            lines=lines,
            more=broken - len(lines),
            queues=queues,
            queue_links={queue.name: address("jobs", queue=queue.name) for queue in queues},
            workers=workers,
            alive=sum(worker.alive for worker in workers),
            totals=self.system.totals(),
            try_it="" if any(counts.values()) else self._try_it(req),
            back="overview",
        )

    @page
    def on_get_jobs(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The list, newest first, by status, type, queue, group or text, one page at a time."""
        filters = _filters(lambda name: req.get_param(name))
        cursor = req.get_param("cursor") or None
        status = filters.setdefault("status", "")
        found = self.system.jobs(**_wanted(filters), limit=JOBS_SHOWN, cursor=cursor)
        counts = self.system.counts()
        asked = job_view.verbs_for(status) if req.context.may_act else []
        self._show(
            req,
            resp,
            "jobs",
            # A search for text looks at every job, and some others at very many: not every few seconds.
            poll=None if cursor or "q" in filters or found.cut_short else address("jobs", **filters),
            title="Jobs",
            headline=f"{status.capitalize()} jobs" if status else "Jobs",
            filters=filters,
            narrowed=any(filters.values()),
            counts=[(each, counts[each]) for each in STATUSES],
            links={each: address("jobs", **{**filters, "status": each}) for each in STATUSES},
            everything=address("jobs", **{**filters, "status": None}),
            lines=[job_view.line(job) for job in found.jobs],
            newest=address("jobs", **filters) if cursor else None,
            older=address("jobs", **filters, cursor=found.next_cursor) if found.next_cursor else None,
            cut_short=found.cut_short,
            asked=asked,
            all_links={verb: address("many", verb, **filters) for verb, _ in asked} if any(filters.values()) else {},
            types=sorted(self.system.types.types),
            queues=[queue.name for queue in self.system.queues()],
            try_it="" if any(counts.values()) else self._try_it(req),
            back="jobs?" + urlencode({**filters, "cursor": cursor or ""}),
        )

    @page
    def on_get_job(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Everything about one job, and why it is where it is."""
        now = datetime.now(timezone.utc)
        (job, failures, events), workers = self.system.history(job_id), self.system.workers()
        queues = [] if job.finished else self.system.queues()
        names = {worker.id: f"{worker.host}:{worker.pid}" for worker in workers}
        self._show(
            req,
            resp,
            "job",
            poll=None if job.finished else address("jobs", job.id),
            now=now,
            title=f"{job.type} {job.status.lower()}",
            job=job,
            reason=reasons.reason(job, queues, workers, now),
            paused=any(queue.paused for queue in queues if queue.name == job.queue),
            buttons=job_view.buttons(job),
            error=job_view.error_text(job),
            failures=failures[::-1],
            facts=job_view.facts(job, failures, names, now),
            names=names,
            events=[job_view.moment(event, names, now) for event in events[-EVENTS_SHOWN:]],
            earlier=max(0, len(events) - EVENTS_SHOWN),
            back="job",
        )

    @page
    def on_post_job_verb(self, req: falcon.Request, resp: falcon.Response, job_id: str, verb: str) -> None:
        """Retry, dead-letter or cancel one job, then back to where the button was."""
        form = self._form(req)
        ask = {"retry": self.system.retry, "dead-letter": self.system.bury, "cancel": self.system.cancel}.get(verb)
        if ask is None:
            raise _no_page()
        job = ask(job_id, by=_user(req))
        done = "stop" if verb == "cancel" and not job.finished else verb
        _redirect(resp, return_address(form.get("back", ""), job.id, done=done, of=job.id))

    def on_get_job_verb(self, req: falcon.Request, resp: falcon.Response, job_id: str, verb: str) -> None:
        """Somebody reloads the answer to a button: show the job."""
        _redirect(resp, address("jobs", job_id))

    @page
    def on_get_many(self, req: falcon.Request, resp: falcon.Response, verb: str) -> None:
        """Ask whether all that match are meant, with their number."""
        known, filters = _verb(verb), _filters(lambda name: req.get_param(name))
        if not filters:
            raise Refused(falcon.HTTP_400, "All of which jobs?", "Narrow the list of jobs first: by status, type, queue, group or text.")
        as_of = _moment(req.get_param("as_of")) or self.system.now()
        count = self.system.count_matching(known.name, as_of=as_of, **_wanted(filters))
        some = "more than " if count > verbs.MOST else ""
        jobs = f"{some}{plural(min(count, verbs.MOST), 'job')}"
        headline = f"{known.label} {jobs}?" if count else f"No job to {known.label.lower()}"
        self._show(
            req,
            resp,
            "many",
            title=headline,
            headline=headline,
            verb=verb,
            label=f"{known.label} {jobs}",
            count=count,
            filters=filters,
            statuses=[filters["status"]] if "status" in filters else list(verbs.VERBS[known.name].usual),
            as_of=as_of.isoformat(),
            back=address("jobs", **filters),
        )

    @page
    def on_post_many(self, req: falcon.Request, resp: falcon.Response, verb: str) -> None:
        """Do it to the jobs that were picked, or to all that match as they did when it was asked."""
        form, known = self._form(req), _verb(verb)
        if "as_of" not in form:
            ids = [id for id in form.get("id", "").split(",") if id]
            if not ids:
                _redirect(resp, return_address(form.get("back", ""), "", done="none", of=verb))
                return
            outcome = self.system.act_on_many(known.name, ids, by=_user(req))
            _redirect(resp, return_address(form.get("back", ""), "", done=f"{verb}-many", of=_numbers(outcome)))
            return
        filters, as_of = _filters(form.get), _moment(form["as_of"])
        if not filters or as_of is None:
            raise Refused(falcon.HTTP_400, "All of which jobs?", "Nothing was changed. Go back to the list, narrow it, and ask again.")
        outcome = self.system.act_on_many(known.name, by=_user(req), as_of=as_of, patience=PATIENCE, **_wanted(filters))
        done = {"done": f"{verb}-many", "of": _numbers(outcome)}
        if outcome.more:
            _redirect(resp, address("many", verb, **filters, as_of=form["as_of"], **done))
        else:
            _redirect(resp, address("jobs", **filters, **done))

    @page
    def on_post_queue_verb(self, req: falcon.Request, resp: falcon.Response, queue: str, verb: str) -> None:
        """Pause or resume one queue, then back to where the button was."""
        form = self._form(req)
        ask = {"pause": self.system.pause, "resume": self.system.resume}.get(verb)
        if ask is None or all(queue != each.name for each in self.system.queues()):
            raise _no_page()
        ask(queue, by=_user(req))
        _redirect(resp, return_address(form.get("back", ""), form.get("job", ""), done=verb, of=queue))

    def on_get_queue_verb(self, req: falcon.Request, resp: falcon.Response, queue: str, verb: str) -> None:
        """Somebody reloads the answer to a button: show the queues."""
        _redirect(resp, HOME)

    @page
    def on_get_static(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """A style sheet, a script or a picture."""
        if not self._pages.send_file(resp, name):
            raise _no_page()

    @page
    def no_such_page(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Every other address below /admin/ui."""
        raise _no_page()

    def refuse(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer who may only look, and pressed a button all the same."""
        text = f"{_user(req)} may look at everything, and change nothing. Nothing was changed."
        self.trouble(req, resp, falcon.HTTP_403, "That is for administrators", text)

    def trouble(
        self, req: falcon.Request, resp: falcon.Response, status: str, title: str, text: str, *, job_id: str = "", again: str = ""
    ) -> None:
        """Answer with the page for what went wrong; `again` is what it tries again by itself."""
        resp.status = status
        self._show(req, resp, "trouble", status=status, title=title, headline=title, text=text, job_id=job_id, again=again)

    def unavailable(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer that PostgreSQL is away. A page tries again by itself; a button and a costly search don't."""
        resp.set_header("Retry-After", str(REFRESH))
        title, text, again = "The database is away", "PostgreSQL can't be reached, or took too long.", ""
        if req.method != "GET":
            text += " What you asked for was probably not done: have a look before you ask again."
        elif req.get_param("q"):
            title, text = "The search did not come back", text + " A text is looked for in every job: name a status, type or queue as well."
        else:
            text += f" Workers keep what they run. This page tries again every {REFRESH} s."
            again = req.relative_uri
        self.trouble(req, resp, falcon.HTTP_503, title, text, again=again)

    def _show(self, req: falcon.Request, resp: falcon.Response, name: str, **context: Any) -> None:
        may_act = bool(req.context.may_act)
        given = {"csrf": self._tokens.make(_user(req)) if may_act else "", "may_act": may_act, "user": _user(req), "flash": _flash(req)}
        self._pages.show(req, resp, name, **{**given, **context})

    def _form(self, req: falcon.Request) -> dict[str, str]:
        form = read_form(req)
        if not self._tokens.fits(form.get("csrf", ""), _user(req)):
            text = "Nothing was changed. The page with the button is from another day, or older than the password: open it anew."
            raise Refused(falcon.HTTP_403, "The button was too old", text)
        return form

    def _try_it(self, req: falcon.Request) -> str:
        """A line for the shell that submits a job here. The Host header is the client's: only a plain one gets into it."""
        plain = re.fullmatch(r"https?://[\w.:\[\]-]+", req.prefix, re.ASCII)
        base = req.prefix if plain else f"http://127.0.0.1:{self.system.settings.port}"
        job_type = self.system.types.find("TEST_JOB")
        body = json.dumps({"type": job_type.name, "payload": job_type.example})
        token = ' -H "Authorization: Bearer $TOKEN"' if self.system.settings.jwt_secret else ""
        return f"curl {base}/jobs -H 'Content-Type: application/json'{token} -d {shlex.quote(body)}"


def _filters(given: Callable[[str], str | None]) -> dict[str, str]:
    """What the list is narrowed by, without what is empty."""
    filters = {name: value for name in FILTERS if (value := (given(name) or "").replace("\0", "").strip())}
    return {**filters, "status": filters["status"].upper()} if "status" in filters else filters


def _wanted(filters: dict[str, str]) -> dict[str, Any]:
    """The same as `JobSystem.jobs` takes it."""
    return {"group_id" if name == "group" else name: value for name, value in filters.items() if value}


def _verb(name: str) -> job_view.Verb:
    if name not in job_view.VERBS:
        raise _no_page()
    return job_view.VERBS[name]


def _moment(text: str | None) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return moment if moment.tzinfo else None


def _numbers(outcome: verbs.Outcome) -> str:
    """How many it was done to, were asked to stop, and were left, in an address."""
    return f"{outcome.done}.{outcome.stopping}.{len(outcome.left)}.{outcome.more:d}"


def _done_to_many(verb: job_view.Verb, numbers: str) -> dict[str, str] | None:
    match = re.fullmatch(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})\.([01])", numbers, re.ASCII)
    if match is None:
        return None
    done, stopping, left, more = map(int, match.groups())
    said = [
        f"{plural(stopping, 'runs and was', 'run and were')} asked to stop." if stopping else "",
        f"{left} could not be: they changed, are gone, or are locked." if left else "",
        "There are more: go on below." if more else "",
    ]
    return {"title": f"{plural(done, 'job')} {verb.done_to_many}", "text": " ".join(part for part in said if part), "job_id": ""}


def _user(req: falcon.Request) -> str:
    return str(req.context.user)


def _redirect(resp: falcon.Response, to: str, status: str = falcon.HTTP_303) -> None:
    resp.status, resp.location = status, to


def _no_page() -> Refused:
    return Refused(falcon.HTTP_404, "There is no such page", "The address is mistyped, or from another version of jobsys.")


def _flash(req: falcon.Request) -> dict[str, str] | None:
    """What the button that led here did, in our words; the address gives no more than a name."""
    done, of = req.get_param("done") or "", (req.get_param("of") or "")[:100]
    if done == "pause":
        return {"title": f"Queue {of} is paused.", "text": "Jobs that run go on; no other starts.", "job_id": ""}
    if done == "resume":
        return {"title": f"Queue {of} is resumed.", "text": "Its jobs start again.", "job_id": ""}
    if done == "stop":
        return {"title": f"Job …{of[-12:]}:", "text": "It runs, was asked to stop, and ends at its next checkpoint.", "job_id": of}
    if done == "none":
        return {"title": "No job was selected.", "text": "Nothing was changed: tick the jobs that are meant.", "job_id": "", "tone": "warn"}
    if (many := done.removesuffix("-many")) != done and many in job_view.VERBS:
        return _done_to_many(job_view.VERBS[many], of)
    if done in job_view.VERBS:
        return {"title": f"Job …{of[-12:]}:", "text": job_view.VERBS[done].done, "job_id": of}
    return None
