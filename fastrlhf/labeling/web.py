"""The web application of a labeling project: pages for labelers, one for the administrator.

A personal link sets a cookie; each change carries a token that is bound to that cookie, so that
another site cannot send it. The pages load nothing from elsewhere.
"""

from __future__ import annotations

import hmac
import json
import random
import time
from collections import defaultdict, deque
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)
from starlette.routing import Route

from fastrlhf.evaluation.human import agreement
from fastrlhf.labeling.exchange import check_answer, json_lines, judgements, training_records
from fastrlhf.labeling.project import Project
from fastrlhf.labeling.store import Assignment, Labeler, StaleRevision, Store

_COOKIE = "fastrlhf_label"
_PAGES = Path(__file__).parent / "pages"
_LARGEST_BODY = 1 << 20  # bytes of one draft or answer
_TYPES = {"label.js": "text/javascript", "label.css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class LabelingSite:
    """The handlers of one project."""

    def __init__(self, project: Project, store: Store) -> None:
        self._project, self._store = project, store
        self._requests: dict[str, deque[float]] = defaultdict(deque)
        # autoescape is on for every template: prompts and responses are never markup.
        self._pages = Environment(
            loader=FileSystemLoader(_PAGES), autoescape=True, undefined=StrictUndefined
        )

    def application(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/", self.task),
            Route("/link/{token}", self.link),
            Route("/static/{name}", self.static),
            Route("/draft", self.draft, methods=["POST"]),
            Route("/answer", self.answer, methods=["POST"]),
            Route("/skip", self.skip, methods=["POST"]),
            Route("/admin", self.admin),
            Route("/admin/export/{kind}", self.export),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _refuse})

    async def link(self, request: Request) -> Response:
        """Log the owner of a personal link in."""
        token = request.path_params["token"]
        await self._authenticated(request, token)
        response = RedirectResponse("/", 303, headers=_HEADERS)
        secure = request.url.scheme == "https"
        response.set_cookie(_COOKIE, token, httponly=True, samesite="lax", secure=secure)
        return response

    async def static(self, request: Request) -> Response:
        """Send the script or the style sheet."""
        name = request.path_params["name"]
        if name not in _TYPES:
            raise HTTPException(404)
        text = (_PAGES / name).read_text(encoding="utf-8")
        return Response(text, media_type=_TYPES[name], headers=_HEADERS)

    async def task(self, request: Request) -> Response:
        """Show the labeler's item."""
        labeler = await self._authenticated(request)
        item = await run_in_threadpool(self._store.next_item, labeler.id)
        return self._html(
            "task.html",
            project=self._project,
            labeler=labeler,
            item=item,
            turns=[] if item is None else _turns(item.row["prompt"]),
            responses=[] if item is None else _shuffled(item, labeler),
            state={} if item is None else {"draft": item.draft, "task": self._project.task},
            csrf=_csrf(request.cookies[_COOKIE]),
        )

    async def draft(self, request: Request) -> Response:
        """Save a draft and return its revision."""
        labeler, sent = await self._change(request)
        revision = await self._run(
            self._store.save_draft, labeler.id, sent["item"], sent["revision"], sent.get("answer")
        )
        return JSONResponse({"revision": revision}, headers=_HEADERS)

    async def answer(self, request: Request) -> Response:
        """Save an answer."""
        labeler, sent = await self._change(request)
        task, responses = self._project.task, await self._responses(sent["item"])
        try:
            answer = check_answer(sent.get("answer"), task, responses, self._project)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        await self._run(self._store.submit, labeler.id, sent["item"], sent["revision"], answer)
        return JSONResponse({"saved": True}, headers=_HEADERS)

    async def skip(self, request: Request) -> Response:
        """Give an item back."""
        labeler, sent = await self._change(request)
        reason = sent.get("reason")
        if not isinstance(reason, str) or not reason.strip():
            raise HTTPException(422, "give a reason for skipping")
        await self._run(self._store.skip, labeler.id, sent["item"], sent["revision"], reason)
        return JSONResponse({"saved": True}, headers=_HEADERS)

    async def admin(self, request: Request) -> Response:
        """Show progress and speed of the team."""
        await self._administrator(request)
        progress = await run_in_threadpool(self._store.progress)
        found = await run_in_threadpool(lambda: agreement(list(judgements(self._store.answers()))))
        return self._html("admin.html", project=self._project, progress=progress, agreement=found)

    async def export(self, request: Request) -> Response:
        """Send the judgements, or the records for training, as JSONL."""
        await self._administrator(request)
        kind = request.path_params["kind"]
        if kind not in ("judgements", "training"):
            raise HTTPException(404)

        def lines() -> str:
            records = judgements(self._store.answers())
            return json_lines(training_records(records) if kind == "training" else records)

        text = await run_in_threadpool(lines)
        named = {"Content-Disposition": f'attachment; filename="{kind}.jsonl"'}
        return Response(text, media_type="application/x-ndjson", headers={**_HEADERS, **named})

    async def _responses(self, item_id: str) -> int:
        row = await run_in_threadpool(self._store.row, item_id)
        if row is None:
            raise HTTPException(404, "the item does not exist")
        return len(row.get("responses", []))

    async def _authenticated(self, request: Request, token: str | None = None) -> Labeler:
        token = token or request.cookies.get(_COOKIE, "")
        client = request.client.host if request.client else ""
        labeler = await run_in_threadpool(self._store.labeler, token)
        # Guesses share one budget per address, a labeler has one of their own.
        self._limit(f"labeler {labeler.id}" if labeler else f"address {client}")
        if labeler is None:
            raise HTTPException(403, "Open the personal link that you were given.")
        return labeler

    async def _administrator(self, request: Request) -> None:
        if not (await self._authenticated(request)).admin:
            raise HTTPException(403, "This page is for the administrator.")

    async def _change(self, request: Request) -> tuple[Labeler, dict[str, Any]]:
        labeler = await self._authenticated(request)
        expected = _csrf(request.cookies[_COOKIE])
        given = request.headers.get("x-csrf-token", "")
        if not hmac.compare_digest(given.encode(), expected.encode()):
            raise HTTPException(403, "The form is not from this page; reload it.")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _LARGEST_BODY:
                raise HTTPException(413, "The answer is longer than 1 MiB.")
        try:
            sent = json.loads(body)
        except ValueError:
            raise HTTPException(400, "expected JSON") from None
        if not isinstance(sent, dict) or not isinstance(sent.get("item"), str):
            raise HTTPException(400, "expected an object with item and revision")
        if type(sent.get("revision")) is not int:
            raise HTTPException(400, "expected an object with item and revision")
        return labeler, sent

    async def _run(self, method: Any, *arguments: Any) -> Any:
        try:
            return await run_in_threadpool(method, *arguments)
        except StaleRevision as error:
            raise HTTPException(409, f"{error}; reload the page") from None

    def _limit(self, key: str) -> None:
        now, times = time.monotonic(), self._requests[key]
        while times and times[0] <= now - 60:
            times.popleft()
        if len(times) >= self._project.requests_per_minute:
            raise HTTPException(429, "Too many requests; wait a minute.")
        times.append(now)

    def _html(self, page: str, **values: Any) -> Response:
        return HTMLResponse(self._pages.get_template(page).render(**values), headers=_HEADERS)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(error.detail, error.status_code, headers=_HEADERS)


def _csrf(token: str) -> str:
    return hmac.new(token.encode(), b"csrf", sha256).hexdigest()


def _turns(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else prompt


def _shuffled(item: Assignment, labeler: Labeler) -> list[tuple[int, str]]:
    """Return (index, text) in an order that is fixed for an item and a labeler: sides are blind."""
    pairs = list(enumerate(item.row.get("responses", [])))
    random.Random(f"{item.item_id} {labeler.id}").shuffle(pairs)
    return pairs
