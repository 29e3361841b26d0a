"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, for clients that were written for vLLM.

Where vLLM takes a path, this takes a selector of the registry, and nothing else.
"""

import asyncio
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, post
from msgspec import Meta

from registry.adapter import Selector
from registry.errors import Conflict, InvalidName, NotFound
from serving.api.adapters import decode_body
from serving.api.auth import declare
from serving.api.record import record_of
from serving.api.request_error import RequestError
from serving.api.services import read_json, services_of
from serving.tenants.keys import ADMIN

AnyRequest = Request[Any, Any, Any]
LoraName = Annotated[str, Meta(max_length=200)]


class Load(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's body. Empty is what is left out, for which vLLM has its own words."""

    lora_name: LoraName = ""
    lora_path: Annotated[str, Meta(max_length=4096)] = ""
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False


class Unload(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's body; its clients may send a number beside the name, which says it all, there too."""

    lora_name: LoraName = ""
    lora_int_id: int | None = None


@post("/v1/load_lora_adapter", opt=declare(ADMIN, operator=True), status_code=200)
async def load_lora_adapter(request: AnyRequest) -> Response[str]:
    """Load a version, keep it in its slot, and answer `model: lora_name` with it."""
    services, record = services_of(request.app), record_of(request.scope)
    wanted = decode_body(await read_json(request), Load)
    if not wanted.lora_name or not wanted.lora_path:
        raise RequestError("Both 'lora_name' and 'lora_path' must be provided.")
    selector = _selector(wanted.lora_path)
    if await _is_known(request, wanted.lora_name):
        raise RequestError(
            f"{wanted.lora_name!r} is a model here already: ask for it as it is, or load the "
            "version under another name.",
            param="lora_name",
        )
    version = await services.router.version(str(selector), request.user)
    try:
        await services.loaded.load(wanted.lora_name, version, again=wanted.load_inplace)
    except Conflict as error:
        raise RequestError(error.message, param="lora_name") from error
    record.digest = version.digest
    return _said(f"Success: LoRA adapter '{wanted.lora_name}' added successfully.")


@post("/v1/unload_lora_adapter", opt=declare(ADMIN, operator=True), status_code=200)
async def unload_lora_adapter(request: AnyRequest) -> Response[str]:
    """Forget the name and let its slot be used by others; what runs goes on."""
    wanted = decode_body(await read_json(request), Unload)
    if not wanted.lora_name:
        raise RequestError("'lora_name' needs to be provided to unload a LoRA adapter.")
    await services_of(request.app).loaded.unload(wanted.lora_name)
    return _said(f"Success: LoRA adapter '{wanted.lora_name}' removed successfully.")


def _selector(lora_path: str) -> Selector:
    try:
        return Selector.parse(lora_path)
    except InvalidName as error:
        raise RequestError(
            f"`lora_path` is {lora_path[:100]!r}: this server loads no path and no URL. Push the "
            "adapter and name its version: NAMESPACE/NAME, with @vN, @ALIAS or @sha256:….",
            param="lora_path",
            code="lora_path_refused",
        ) from error


async def _is_known(request: AnyRequest, name: str) -> bool:
    """Tell whether a name means something without being loaded."""
    services = services_of(request.app)
    if services.router.is_base(name) or services.endpoints.of(name, request.user):
        return True
    try:
        selector = Selector.parse(name, request.user.namespace)
        await asyncio.to_thread(services.registry.versions, selector.name)
    except (InvalidName, NotFound):
        return False
    return True


def _said(sentence: str) -> Response[str]:
    return Response(sentence, media_type="text/plain")
