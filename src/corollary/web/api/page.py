"""The page that says what the API has."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from corollary.web.pages.render import respond

router = APIRouter(include_in_schema=False)


@router.get("/api")
def about(request: Request) -> Response:
    """The addresses, out of the description."""
    operations = [
        (
            path,
            method,
            {"summary": told.get("description") or told.get("summary", ""), "parameters": told.get("parameters", [])},
        )
        for path, methods in request.app.openapi()["paths"].items()
        for method, told in methods.items()
    ]
    return respond(request, "api.html", operations=operations, origin=request.app.state.settings.address)
