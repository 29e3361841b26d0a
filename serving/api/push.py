"""POST /v1/adapters/{namespace}/{name}/versions: push a version over HTTP.

The body is a multipart form with one part for each file; a part's field name is the file's name.
It only picks one of the few names a version may have, and never becomes a path by itself.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from litestar import Request, Response, post
from litestar.params import FromPath
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from registry.adapter import AdapterRef, Version
from registry.contents import CONFIG_NAME, WEIGHTS_NAME
from registry.records import Push
from registry.upload import ALLOWED, IncomingFile, UploadedFile
from serving.api.adapters import own_adapter
from serving.api.auth import declare
from serving.api.errors import RequestError
from serving.api.record import record_of
from serving.api.services import Services, parameters_of, services_of
from serving.engine.boundary import AdapterFiles
from serving.tenants.keys import PUSH

MULTIPART = "multipart/form-data"
HELD_BYTES = 1 << 20  # of a push, before they are written; the piece before is on its way then
KEPT_BYTES = 64 << 20  # of weights, which then need not be read and hashed again to be worn
_encode = msgspec.json.Encoder().encode


@post("/v1/adapters/{namespace:str}/{name:str}/versions", opt=declare(PUSH))
async def push_version(
    request: Request[Any, Any, Any], namespace: FromPath[str], name: FromPath[str]
) -> Response[bytes]:
    """Answer 201 with a new version, 200 with the one that has this content already."""
    services, record = services_of(request.app), record_of(request.scope)
    registry = services.registry
    adapter = own_adapter(request, namespace, name)
    base = parameters_of(request, {"base"}).get("base")
    with registry.staging() as folder:
        files = await _receive(request.stream(), _boundary(request), folder)
        store = partial(registry.push_staged, folder, files.done, adapter)
        passed = partial(_expect, services, files)
        pushed = await asyncio.to_thread(store, base=base, actor=record.tenant, passed=passed)
    services.router.learn(pushed.version)
    record.label, record.digest = pushed.version.ref.label, pushed.version.digest
    status = 201 if pushed.created else 200
    return Response(_answer(pushed), status_code=status, media_type="application/json")


def _expect(services: Services, files: "_Files", version: Version) -> None:
    """Read what is about to be a version of this base: it is likely to be asked for at once.

    Nobody can name it before it is one.
    """
    content = files.adapter(version)
    if content is not None and services.router.runs(version):
        ref = AdapterRef(version.digest, str(version.name))  # it has no number yet
        services.engine.prefetch(ref, content)


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


async def _receive(chunks: AsyncIterator[bytes], boundary: str, folder: Path) -> "_Files":
    """Write the parts into the folder as they come. Raises Refused, RequestError."""
    files = _Files(folder)
    try:
        with PushMultipartParser(boundary, max_segment_count=len(ALLOWED)) as parser:
            async for chunk in chunks:
                for part in parser.parse(chunk):
                    await files.take(part)
    except MultipartError as error:
        raise RequestError(
            f"The body is not {MULTIPART}: {error}.", code="invalid_multipart"
        ) from error
    finally:
        files.close()
    return files


class _Files:
    """The files of one push. A thread writes and hashes a piece while the next one comes.

    A disk that is slow must not stop the streams. And not for each chunk of 64 KB: they wait for
    hundreds of turns, too.
    """

    def __init__(self, folder: Path) -> None:
        self.done: list[UploadedFile] = []
        self._folder = folder
        self._file: IncomingFile | None = None
        self._pieces: list[bytes] = []
        self._held = 0
        self._weights: list[bytes] | None = []  # what was written of them, unless it is too much
        self._thread = ThreadPoolExecutor(1, "push")
        self._writing: Future[None] | None = None

    async def take(self, part: MultipartSegment | bytes | bytearray | None) -> None:
        """Take what the parser gives: the head of a file, a part of it, None at its end."""
        if isinstance(part, MultipartSegment):
            self._file = _open(self._folder, part.name or "")
        elif part and self._file is not None:
            self._pieces.append(bytes(part))
            self._held += len(part)
            if self._held >= HELD_BYTES:
                await self._write(self._file)
        elif self._file is not None:
            await self._write(self._file)
            await self._written()
            self.done.append(self._file.close())

    def adapter(self, version: Version) -> AdapterFiles | None:
        """Return the files of an adapter, from memory, if they are those of the version.

        The digest of the weights is that of these very bytes, taken while they were written.
        """
        if self._weights is None or version.files.keys() != {CONFIG_NAME, WEIGHTS_NAME}:
            return None
        config = (self._folder / CONFIG_NAME).read_bytes()
        found = {file.path.name: file.sha256 for file in self.done}
        found[CONFIG_NAME] = hashlib.sha256(config).hexdigest()  # the gate has written it anew
        if any(found.get(name) != sha256 for name, sha256 in version.files.items()):
            return None  # it was converted
        return AdapterFiles(config, self._weights)

    def close(self) -> None:
        """Close the file behind what is still being written to it. Waits for nothing."""
        if self._file is not None:
            self._thread.submit(self._file.close)
        self._thread.shutdown(wait=False)

    async def _write(self, file: IncomingFile) -> None:
        await self._written()
        pieces, self._pieces, self._held = self._pieces, [], 0
        if file.path.name == WEIGHTS_NAME and self._weights is not None:
            self._weights += pieces
            if sum(map(len, self._weights)) > KEPT_BYTES:
                self._weights = None
        self._writing = self._thread.submit(file.write, pieces)

    async def _written(self) -> None:
        if self._writing is not None:
            await asyncio.wrap_future(self._writing)


def _open(folder: Path, name: str) -> IncomingFile:
    try:
        return IncomingFile(folder, name)
    except FileExistsError:
        raise RequestError(f"There are two parts named {name}.", code="invalid_multipart") from None
