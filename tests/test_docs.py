"""The commands in README and docs run as they stand, on a tiny base under the default base's id.

A page is one shell script: the `$ ` lines of its ```console blocks and its ```python blocks, in
order, in a fresh home. `wardrobe serve` runs in the background until the page ends. Blocks of
other languages are not run. The command that most pages begin with is run once, and each of them
goes on in a copy of what it left.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from filelock import FileLock

from registry.base import Bases
from tests.live import DEFAULT_BASE, Shop, free_port
from tests.tiny import make_base

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.M | re.S)
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if page.name != "cli.md" and BLOCK.search(page.read_text())
]
TEXTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```.*?^```", re.M | re.S)
# These set up a machine or take the real base: CI is the first, and `make demo` is run by hand.
NOT_HERE = ("make ", "git clone", "cd ")
BEGINNING = "wardrobe train adapters/smart-home --set train.steps=5 --push"

HEAD = """set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
set -x
"""
WAIT_READY = """
for _ in $(seq 600); do
  curl -sf http://127.0.0.1:8000/health/live > /dev/null && break
  sleep 0.1
done
"""


def commands(block: str) -> list[str]:
    """Join the continuation lines of each `$ ` command; what it prints is not compared."""
    lines = block.splitlines()
    found: list[str] = []
    for i, line in enumerate(lines):
        if line.startswith("$ "):
            command = line[2:]
            while command.endswith("\\"):
                i += 1
                command += "\n" + lines[i]
            found.append(command)
    return found


def as_shell(command: str) -> str:
    if command.startswith(NOT_HERE):
        return ""
    if command.startswith("wardrobe serve"):
        return f"{command} &\n{WAIT_READY}"
    return command


def script_of(page: Path) -> str:
    parts: list[str] = []
    for language, block in BLOCK.findall(page.read_text()):
        if language == "python":
            parts.append(f"python - <<'WARDROBE_PYTHON'\n{block}WARDROBE_PYTHON")
        else:
            parts += [as_shell(command) for command in commands(block)]
    return HEAD + "\n".join(parts)


def prepared(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapters").symlink_to(ROOT / "adapters")
    return folder


def run(script: str, folder: Path, cache: Path) -> Path:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=Shop(folder / "home", cache).environment | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    tail = textwrap.indent((done.stdout + done.stderr)[-3000:], "    ")
    assert done.returncode == 0, tail
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def cache(shared: Path) -> Path:
    folder = shared / "cache-of-docs"
    with FileLock(shared / "cache-of-docs.lock"):
        if not folder.exists():
            making = shared / "cache-in-the-making"
            made = make_base(making / "made", max_position_embeddings=2048)
            Bases(making / "bases").add(DEFAULT_BASE, made, origin="made for a test")
            making.rename(folder)
    return folder


@pytest.fixture(scope="session")
def begun(shared: Path, cache: Path) -> Path:
    """Return the folder, with its home, in which BEGINNING was run."""
    folder = shared / "begun"
    with FileLock(shared / "begun.lock"):
        if not folder.exists():
            run(BEGINNING, prepared(shared / "beginning"), cache).rename(folder)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(
    page: Path, cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    script = script_of(page).replace(":8000", f":{free_port()}")
    port = re.search(r"127\.0\.0\.1:(\d+)", script)
    if port:
        script = script.replace("wardrobe serve", f"wardrobe serve --port {port[1]}")
    folder = tmp_path / "page"
    first, _, rest = script.removeprefix(HEAD).partition("\n")
    if first == BEGINNING:
        shutil.copytree(request.getfixturevalue("begun"), folder, symlinks=True)
        run(HEAD + rest, folder, cache)
    else:
        run(script, prepared(folder), cache)


def test_the_command_reference_is_what_the_commands_say(tmp_path: Path) -> None:
    typer = Path(sys.executable).with_name("typer")
    written = tmp_path / "cli.md"
    wanted = ("utils", "docs", "--name", "wardrobe", "--title", "The command line")
    subprocess.run(
        [typer, "wardrobe", *wanted, "--output", written],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert written.read_text() == (ROOT / "docs/cli.md").read_text(), "run `make docs`"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if not path.startswith("http"):
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Return what GitHub makes of the headings: no punctuation, hyphens for spaces."""
    heads = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.M)
    texts = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).strip().lower() for head in heads)
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}
