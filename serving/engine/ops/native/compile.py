"""g++ makes the operators into a library, once for each source, format, processor and torch.

A plain C interface and no torch headers: the build takes seconds instead of a minute and does not
depend on torch's ABI. OpenMP is compiled in but not linked: its symbols come from the runtime that
torch has loaded, because two runtimes would mean two pools of threads waiting for the same cores.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

from serving.engine.ops.native.target import Target

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-psabi")
NUMBERS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
SEAL_BYTES = 32  # sha256 of what is before it, at the end of the file: ELF does not mind
BUILD_SECONDS = 600


class NotCompiled(Exception):
    """There are no compiled operators; the message says why."""


class CompilerFailed(NotCompiled):
    """The compiler did not take it; another set of instructions it may."""


def compiled(target: Target, dtype: torch.dtype, cache: Path) -> Path:
    """Return the library, building it when it is not in the cache. Raises NotCompiled.

    Safe for several processes: one builds, the others wait for it. A damaged file is built again.
    """
    flags = (*FLAGS, *target.flags, *NUMBERS[dtype])
    path = cache / f"{_key(flags)}.so"
    if _sealed(path):
        return path
    compiler = shutil.which("g++")
    if compiler is None:
        raise NotCompiled("there is no g++ on the PATH; install it (Debian: apt install g++)")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not _sealed(path):
                logger.info("building the operators for %s (%s)", target.name, dtype)
                _build(compiler, flags, path)
    except OSError as error:
        raise NotCompiled(f"{cache} cannot be written: {error}") from error
    return path


def _key(flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256("\0".join((*flags, torch.__version__)).encode())
    for source in sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _sealed(path: Path) -> bool:
    """Tell whether the file is whole. Loading a damaged library can end the process."""
    if not path.is_file():
        return False
    data = path.read_bytes()
    return hashlib.sha256(data[:-SEAL_BYTES]).digest() == data[-SEAL_BYTES:]


def _build(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unit, library = Path(folder) / "operators.o", Path(folder) / "operators.so"
        _run(compiler, *flags, "-c", str(SOURCES / "operators.cpp"), "-o", str(unit))
        _run(compiler, "-shared", str(unit), "-o", str(library))
        data = library.read_bytes()
        library.write_bytes(data + hashlib.sha256(data).digest())
        library.replace(path)


def _run(*command: str) -> None:
    environment = os.environ | {"LC_ALL": "C"}
    try:
        subprocess.run(  # noqa: S603  # the compiler that `which` found, and our own sources
            command, env=environment, check=True, capture_output=True, timeout=BUILD_SECONDS
        )
    except subprocess.CalledProcessError as error:
        first = error.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise CompilerFailed(f"{command[0]} failed: {first}") from error
    except subprocess.TimeoutExpired as error:
        raise NotCompiled(f"{command[0]} did not end in {BUILD_SECONDS} s") from error
