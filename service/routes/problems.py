"""GET /problems/{slug}: explains a problem; the `type` of a problem document links here."""

import html

from fastapi.responses import HTMLResponse

from calmclip.models.errors import UnknownName, suggestion
from calmclip.service.asked import Asked
from calmclip.service.endpoints import CATALOG, Endpoint
from calmclip.service.problems import PROBLEMS


@Endpoint(
    "GET",
    "/problems/{slug}",
    task=CATALOG,
    scope="read",
    summary="What a problem means",
    tags=("catalog",),
    problems=("not-found",),
    responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
)
async def explain_problem(asked: Asked[None], slug: str) -> HTMLResponse:
    if slug not in PROBLEMS:
        raise UnknownName(f"no problem is named {slug!r}; {suggestion(slug, PROBLEMS)}", known=PROBLEMS)
    problem = PROBLEMS[slug]
    title, text = html.escape(f"{problem.status} {problem.title}"), html.escape(problem.explanation)
    return HTMLResponse(f"<!doctype html><html lang=en><title>{title}</title><h1>{title}</h1><p>{text}</p></html>")
