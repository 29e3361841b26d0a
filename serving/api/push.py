"""POST /v1/adapters/{namespace}/{name}/versions: push a version over HTTP.

The body is a multipart form with one part for each file; a part's field name is the file's name.
It only picks one of the few names a version may have, and never becomes a path by itself.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from litestar import Request, Response, post
from litestar.params import FromPath
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from registry.errors import Refused
from registry.records import Push
from registry.upload import ALLOWED, check_name
from serving.api.adapters import own_adapter
from serving.api.auth import declare
from serving.api.errors import RequestError
from serving.api.record import record_of
from serving.api.services import parameters_of, services_of
from serving.tenants.keys import PUSH

MULTIPART = "multipart/form-data"
HELD_BYTES = 1 << 20  # of a push, before they are written
_encode = msgspec.json.Encoder().encode


@post("/v1/adapters/{namespace:str}/{name:str}/versions", opt=declare(PUSH))
async def push_version(
    request: Request[Any, Any, Any], namespace: FromPath[str], name: FromPath[str]
) -> Response[bytes]:
    """Answer 201 with a new version, 200 with the one that has this content already."""
    registry, record = services_of(request.app).registry, record_of(request.scope)
    adapter = own_adapter(request, namespace, name)
    base = parameters_of(request, {"base"}).get("base")
    with registry.staging() as folder:
        await _receive(request.stream(), _boundary(request), folder)
        pushed = await asyncio.to_thread(
            registry.push_staged, folder, adapter, base=base, actor=record.tenant
        )
    record.label, record.digest = pushed.version.ref.label, pushed.version.digest
    status = 201 if pushed.created else 200
    return Response(_answer(pushed), status_code=status, media_type="application/json")


def _answer(pushed: Push) -> bytes:
    version = pushed.version
    return _encode(
        {
            "id": version.ref.label,
            "object": "adapter.version",
            "number": version.number,
            "digest": f"sha256:{version.digest}",
            "base": version.base_id,
            "created": pushed.created,
            "warnings": [{"code": code, "message": text} for code, text in pushed.warnings],
        }
    )


def _boundary(request: Request[Any, Any, Any]) -> str:
    media_type, options = request.content_type
    if media_type != MULTIPART or not options.get("boundary"):
        raise RequestError(
            f"A push is a {MULTIPART} body with one part a file: "
            "curl -F adapter_config.json=@… -F adapter_model.safetensors=@…",
            code="unsupported_media_type",
            status=415,
        )
    return options["boundary"]


async def _receive(chunks: AsyncIterator[bytes], boundary: str, folder: Path) -> None:
    """Write the parts into the folder as they come. Raises Refused, RequestError."""
    file: BinaryIO | None = None
    room = held = 0
    pieces: list[bytes] = []
    try:
        with PushMultipartParser(boundary, max_segment_count=len(ALLOWED)) as parser:
            async for chunk in chunks:
                for part in parser.parse(chunk):
                    if isinstance(part, MultipartSegment):
                        name = part.name or ""
                        file, room = _open(folder, name), ALLOWED[name]
                    elif part and file is not None:
                        room -= len(part)
                        if room < 0:
                            raise _too_large(file)
                        pieces.append(part)
                        held += len(part)
                        if held >= HELD_BYTES:
                            # Off the loop: a disk that is slow must not stop the streams. And not
                            # for each piece of 64 KB: they wait for hundreds of turns, too.
                            await asyncio.to_thread(file.writelines, pieces)
                            pieces, held = [], 0
                    elif file is not None:
                        await asyncio.to_thread(file.writelines, pieces)
                        pieces, held = [], 0
                        file.close()
    except MultipartError as error:
        raise RequestError(
            f"The body is not {MULTIPART}: {error}.", code="invalid_multipart"
        ) from error
    finally:
        if file is not None:
            file.close()


def _open(folder: Path, name: str) -> BinaryIO:
    if problems := check_name(name):
        raise Refused.because(problems)
    try:
        return (folder / name).open("xb")
    except FileExistsError:
        raise RequestError(f"There are two parts named {name}.", code="invalid_multipart") from None


def _too_large(file: BinaryIO) -> Refused:
    name = Path(file.name).name
    return Refused.because([("too_large", f"{name} is over {ALLOWED[name]} bytes.")])
