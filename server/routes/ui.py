"""The playground and the files of all pages. Not there under --strict-tgi, nor with --disable-ui."""

from __future__ import annotations

from fastapi import HTTPException, Request, Response

from server.operation import Area, Operation
from server.ui.pages import PLAYGROUND, PageFile, page_files

area = Area()

PLAYGROUND_PATH = "/ui"


@area.serve(
    Operation(
        method="GET",
        path=PLAYGROUND_PATH,
        summary="A page to try the model on, which browsers get at / as well",
        text="text/html; charset=utf-8",
        is_open=True,
    )
)
async def playground(request: Request) -> Response:
    return page_answer(request, page_files()[PLAYGROUND])


@area.serve(
    Operation(
        method="GET",
        path="/ui/{name}",
        summary="A script or style of a page",
        text="*/*",
        errors=(404,),
        is_open=True,
    ),
)
async def file(request: Request, name: str) -> Response:
    page_file = page_files().get(name)
    if page_file is None or page_file.is_page:
        raise HTTPException(404)
    return page_answer(request, page_file)


def page_answer(request: Request, page_file: PageFile) -> Response:
    """The file, or 304 for a browser that has it."""
    etags = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if page_file.etag in etags:
        return Response(status_code=304, headers=page_file.headers)
    return Response(page_file.body, headers=page_file.headers)
