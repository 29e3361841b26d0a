"""The header of a safetensors file, read in plain Python and within bounds.

The format: 8 bytes little-endian header length, a JSON header, then the bytes of the tensors.
https://github.com/huggingface/safetensors#format. The reference reader accepts duplicate keys
and headers of 100 MB; this one does not.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import numpy as np

from registry.errors import Refused, refused
from registry.jsonfile import parse_object, read_object

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_FIELDS = {"dtype", "shape", "data_offsets"}
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 32 << 20
CHUNK = 8 << 20  # bytes read at once


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest header that is read and the most tensors it may name."""

    header_bytes: int
    tensors: int
    dims: int = 8


ADAPTER_BOUNDS = Bounds(header_bytes=1 << 20, tensors=4096)
BASE_BOUNDS = Bounds(header_bytes=25_000_000, tensors=100_000)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file, as its header describes it."""

    name: str
    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    path: Path
    start: int  # first byte in the file
    stop: int  # one past its last byte


def read_header(path: Path, bounds: Bounds) -> dict[str, Tensor]:
    """Return name → tensor of one safetensors file, in the order of their bytes.

    Raises Refused unless the tensors tile the file exactly: no overlap, hole or trailing byte.
    """
    size = path.stat().st_size
    return parse_header(header_in(path, size, bounds), size, path, bounds)


def header_in(path: Path, size: int, bounds: Bounds) -> bytes:
    """Return the header of a file of `size` bytes. Raises Refused for one that is too long."""
    with path.open("rb") as file:
        return file.read(_header_length(file.read(8), size, path, bounds))


def header_of(pieces: Iterable[bytes], size: int, path: Path, bounds: Bounds) -> bytes:
    """Return what `header_in` does, from the bytes of the file, `size` in all, in pieces."""
    start = b""
    for piece in pieces:
        start += piece[: 8 + bounds.header_bytes]
        if len(start) >= 8 and len(start) >= 8 + _header_length(start[:8], size, path, bounds):
            break
    return start[8 : 8 + _header_length(start[:8], size, path, bounds)]


def parse_header(data: bytes, size: int, path: Path, bounds: Bounds) -> dict[str, Tensor]:
    """Return what `read_header` does for a file of `size` bytes that begins with this header.

    `path` is what refusals name.
    """
    header, data_start = _parse_json(data, path), 8 + len(data)
    _check_metadata(header.pop("__metadata__", {}), path)
    if len(header) > bounds.tensors:
        message = f"{path.name} names {len(header)} tensors, the limit is {bounds.tensors}."
        raise refused("header_invalid", message)
    tensors = [
        _parse_tensor(name, entry, path, data_start, bounds) for name, entry in header.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_tiling(tensors, data_start, size, path)
    return {tensor.name: tensor for tensor in tensors}


def read_folder(folder: Path, bounds: Bounds = BASE_BOUNDS) -> dict[str, Tensor]:
    """Return name → tensor over all safetensors files of a model folder, sharded or not."""
    tensors: dict[str, Tensor] = {}
    for path in tensor_files(folder):
        for name, tensor in read_header(path, bounds).items():
            if name in tensors:
                other = tensors[name].path.name
                message = f"Tensor {name!r} is both in {other} and in {path.name}."
                raise refused("header_invalid", message)
            tensors[name] = tensor
    return tensors


def tensor_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder: those its index names, else all of them."""
    index = folder / INDEX_NAME
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise refused("file_missing", f"{folder} holds no *.safetensors file.")
        return files
    weight_map = read_object(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise refused("header_invalid", f"{index} has no object `weight_map`.")
    names = {str(name) for name in cast("dict[str, object]", weight_map).values()}
    for name in sorted(names):
        # A name with a slash in it could leave the folder.
        if Path(name).name != name or not (folder / name).is_file():
            raise refused("file_missing", f"{index} names {name!r}, which is not in {folder}.")
    return [folder / name for name in sorted(names)]


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[int]:
    """Write tensors of other files into one of their own, under these names; yield bytes written.

    Nothing of them is held in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.stop - tensor.start
        offsets = [position, end]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        position = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)  # the reference implementation aligns what follows
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for tensor in tensors.values():
            for chunk in read_chunks(tensor):
                file.write(chunk)
                yield len(chunk)


def read_chunks(tensor: Tensor, chunk: int = CHUNK) -> Iterator[bytes]:
    """Yield the bytes of a tensor, `chunk` at most at a time."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.stop - tensor.start
        while left:
            data = file.read(min(chunk, left))
            if not data:
                raise refused("offsets_invalid", f"{tensor.path} ends inside {tensor.name!r}.")
            left -= len(data)
            yield data


def read_array(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the values in float32. Raises Refused for other dtypes than F32, F16 and BF16."""
    if tensor.dtype not in ("F32", "F16", "BF16"):
        text = f"{tensor.name} is {tensor.dtype}; save it as F32, F16 or BF16."
        raise refused("dtype_unsupported", text)
    data = b"".join(read_chunks(tensor))
    if tensor.dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(data, "<f4" if tensor.dtype == "F32" else "<f2")
    return values.astype(np.float32).reshape(tensor.shape)


def largest_magnitudes(path: Path, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, float]]:
    """Yield the tensors of a file, each with its largest absolute value.

    That is infinity when any value is NaN or infinite. The file is opened once, and read into one
    piece of memory: for the hundreds of small tensors of an adapter that is most of the time.
    """
    tensors = list(tensors)
    longest = max((tensor.stop - tensor.start for tensor in tensors), default=0)
    memory = memoryview(bytearray(min(CHUNK, longest)))
    with path.open("rb") as file:
        for tensor in tensors:
            yield tensor, _largest_magnitude(tensor, _read_into(memory, file, tensor))


def _read_into(memory: memoryview, file: BufferedReader, tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor piece by piece, each of which the next one overwrites."""
    file.seek(tensor.start)
    left = tensor.stop - tensor.start
    while left:
        piece = memory[:left]
        if file.readinto(piece) != len(piece):
            raise refused("offsets_invalid", f"{tensor.path} ends inside {tensor.name!r}.")
        left -= len(piece)
        yield piece


def _largest_magnitude(tensor: Tensor, pieces: Iterable[memoryview]) -> float:
    """Works on the bits: without the sign bit, IEEE 754 numbers are ordered like integers.

    So the largest without it is the largest of those that have none, which are the largest as
    signed integers, or of those that have it, which are the largest as unsigned ones.
    """
    size = 4 if tensor.dtype == "F32" else 2
    largest, no_sign = 0, (1 << (8 * size - 1)) - 1
    for piece in pieces:
        positive = int(np.frombuffer(piece, f"<i{size}").max())
        either = int(np.frombuffer(piece, f"<u{size}").max())
        largest = max(largest, positive, either & no_sign)
    if tensor.dtype == "F16":
        value = float(np.array(largest, np.uint16).view(np.float16))
    else:
        shift = 16 if tensor.dtype == "BF16" else 0
        value = float(np.array(largest << shift, np.uint32).view(np.float32))
    return value if np.isfinite(value) else float("inf")


def _header_length(start: bytes, size: int, path: Path, bounds: Bounds) -> int:
    """Return the length that the first 8 bytes of a file of `size` tell."""
    length = int.from_bytes(start, "little")
    if size < 8 or length > size - 8:
        message = f"{path.name} has {size} bytes, too few for its header of {length}."
        raise refused("header_invalid", message)
    if length > bounds.header_bytes:
        message = f"{path.name} has a header of {length} bytes, the limit is {bounds.header_bytes}."
        raise refused("header_too_large", message)
    return length


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    if not data.startswith(b"{"):
        raise refused("header_invalid", f"{path.name} is not a safetensors file.")
    try:
        return parse_object(data, f"the header of {path.name}")
    except Refused as error:
        raise refused("header_invalid", error.message) from error


def _check_metadata(metadata: object, path: Path) -> None:
    strings = isinstance(metadata, dict) and all(
        isinstance(value, str) for value in cast("dict[str, object]", metadata).values()
    )
    if not strings:
        raise refused("header_invalid", f"{path.name}: __metadata__ must map strings to strings.")


def _parse_tensor(name: str, entry: Any, path: Path, data_start: int, bounds: Bounds) -> Tensor:
    if len(name) > 512 or not name.isprintable():
        raise refused("header_invalid", f"{path.name} has the tensor name {name[:60]!r}.")
    if not isinstance(entry, dict) or cast("dict[str, object]", entry).keys() != _FIELDS:
        message = f"{path.name}: {name!r} needs exactly dtype, shape and data_offsets."
        raise refused("header_invalid", message)
    fields = cast("dict[str, object]", entry)
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise refused("dtype_unsupported", f"{path.name}: {name!r} has the dtype {dtype!r}.")
    shape = _sizes(fields["shape"], bounds.dims)
    offsets = _sizes(fields["data_offsets"], 2)
    if shape is None or offsets is None or len(offsets) != 2:
        message = f"{path.name}: {name!r} has a shape or data_offsets that are not sizes."
        raise refused("header_invalid", message)
    start, stop = offsets
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if stop - start != needed:
        what = f"{path.name}: {name!r} of {dtype} {list(shape)}"
        raise refused("offsets_invalid", f"{what} needs {needed} bytes, not {stop - start}.")
    return Tensor(name, dtype, shape, path, data_start + start, data_start + stop)


def _sizes(value: object, most: int) -> tuple[int, ...] | None:
    """Return a list of at most `most` non-negative 48-bit integers as a tuple, else None."""
    if not isinstance(value, list) or len(cast("list[object]", value)) > most:
        return None
    items = cast("list[object]", value)
    sizes = [item for item in items if type(item) is int and 0 <= item < 1 << 48]
    return tuple(sizes) if len(sizes) == len(items) else None


def _check_tiling(tensors: list[Tensor], data_start: int, size: int, path: Path) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps the one before it" if tensor.start < position else "leaves a hole"
            raise refused("offsets_invalid", f"{path.name}: tensor {tensor.name!r} {kind}.")
        position = tensor.stop
    if position != size:
        message = f"{path.name} has {size} bytes, its header describes {position}."
        raise refused("offsets_invalid", message)
