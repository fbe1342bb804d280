"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them, with --allow-runtime-lora-updating."""

from __future__ import annotations

from fastapi import Request, Response

from engine.link.messages import LoadAdapter, UnloadAdapter
from server.errors import AdapterNotFoundError, ValidationError
from server.operation import Area, Operation
from server.requests.adapters import MAX_SHOWN_CHARS, LoadAdapterRequest, UnloadAdapterRequest
from server.service import service_of

TEXT = "text/plain"

area = Area()


@area.serve(
    Operation(
        method="POST",
        path="/v1/load_lora_adapter",
        summary="Let requests name an adapter of the server's disk",
        body=LoadAdapterRequest,
        text=TEXT,
    )
)
async def load_lora_adapter(request: Request) -> Response:
    """Look at the adapter and list it. Its weights come into memory when a request first names it."""
    service = service_of(request)
    body = await service.read_body(request, LoadAdapterRequest)
    names, name = service.validator.adapters, body.lora_name
    async with names.changing:
        names.check_new(body)
        reply = await service.engine.change_adapters(LoadAdapter(name, body.lora_path))
        if reply.error is not None:
            logged = f"the LoRA adapter {name!r} can't be loaded: {reply.error}"
            raise ValidationError(reply.error, logged=logged, param="lora_path")
        names.add(name)
    return Response(f"Success: LoRA adapter '{name}' added successfully.", media_type=TEXT)


@area.serve(
    Operation(
        method="POST",
        path="/v1/unload_lora_adapter",
        summary="Let no request name an adapter any more",
        body=UnloadAdapterRequest,
        text=TEXT,
        errors=(404,),
    )
)
async def unload_lora_adapter(request: Request) -> Response:
    """Requests that have the adapter go on to their end."""
    service = service_of(request)
    body = await service.read_body(request, UnloadAdapterRequest)
    names, name = service.validator.adapters, body.lora_name
    async with names.changing:
        if name not in names:
            raise AdapterNotFoundError(name[:MAX_SHOWN_CHARS], names)
        names.remove(name)
        await service.engine.change_adapters(UnloadAdapter(name))
    return Response(f"Success: LoRA adapter '{name}' removed successfully.", media_type=TEXT)
