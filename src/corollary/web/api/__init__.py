"""JSON: Hugging Face's daily-papers addresses and fields under the same names, and what we add under ``corollary``."""

from __future__ import annotations

from fastapi import APIRouter

from corollary.web.api import methods, page, papers, runs, whole

router = APIRouter()
for part in (papers.router, methods.router, runs.router, whole.router, page.router):
    router.include_router(part)

__all__ = ["router"]
