"""Everything in the store, out and in, for whoever keeps the server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from corollary.web.api.asking import keeping
from corollary.web.api.schemas import ERRORS, Error, Restored
from corollary.web.importers.archive import VERSION, restore, rows
from corollary.web.importers.arxiv import BadAnswer
from corollary.web.importers.sources import ARCHIVE
from corollary.web.importers.write import Counts
from corollary.web.store import now

router = APIRouter(prefix="/api/corollary", tags=["export"], responses={**ERRORS, 403: {"model": Error}})
_JSONL = "application/jsonl"
_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {_JSONL: {"schema": {"type": "string"}}}}}


@router.get(
    "/export", dependencies=[Depends(keeping)], response_class=StreamingResponse,
    responses={200: {"content": {_JSONL: {"schema": {"type": "string"}}}}},
)  # fmt: skip
def export(request: Request) -> StreamingResponse:
    """All papers, votes, notes, lists and subscriptions as JSONL; ``corollary daily import FILE`` brings it back without loss."""
    store = request.app.state.store

    def lines() -> Iterator[str]:
        yield json.dumps({"format": ARCHIVE, "version": VERSION, "at": now().isoformat()}) + "\n"
        for row in rows(store):
            yield json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"

    return StreamingResponse(
        lines(), media_type=_JSONL, headers={"content-disposition": 'attachment; filename="corollary.jsonl"'}
    )


@router.post("/import", dependencies=[Depends(keeping)], openapi_extra=_BODY, responses={413: {"model": Error}})
async def back(request: Request) -> Restored:
    """Bring an export back, as the body; what is there already stays. A larger one than this server reads goes in by
    ``corollary daily import FILE``."""
    body, counts = await request.body(), Counts()
    try:
        await run_in_threadpool(restore, request.app.state.store, io.BytesIO(body), counts)
    except BadAnswer as error:
        raise HTTPException(400, str(error)) from error
    return Restored(added=counts.added, updated=counts.updated, unchanged=counts.unchanged)
