"""What training asks of the Hub, and how it finds out within seconds that no Hub is there."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from training.errors import DataError, HubUnreachable
from training.progress import Progress, Report, own_progress_only
from training.recipe import HubSource

ANSWER_SECONDS = 8.0  # until the Hub counts as absent; a name server that is silent included
SOCKET_SECONDS = 5.0

# Weights as safetensors, configuration and tokenizer. No code, no pickles.
BASE_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, slots=True)
class RepoFiles:
    """The files of one commit of a model repository."""

    repo: str
    commit: str
    sizes: dict[str, int]  # path → bytes


def list_base_files(
    repo: str, *, endpoint: str | None = None, seconds: float = ANSWER_SECONDS
) -> RepoFiles:
    """Ask the Hub which of a model's files we would take. Raises HubUnreachable in `seconds`."""

    def ask() -> Any:
        api = HfApi(endpoint=endpoint)
        return api.model_info(repo, files_metadata=True, timeout=SOCKET_SECONDS)

    with _hub_errors(repo):
        info = _within(seconds, ask)
    sizes = {
        file.rfilename: file.size or 0
        for file in info.siblings or []
        if any(fnmatch(file.rfilename, pattern) for pattern in BASE_FILES)
    }
    return RepoFiles(repo, info.sha, sizes)


def fetch_base_files(
    files: RepoFiles, folder: Path, report: Report, *, endpoint: str | None = None
) -> None:
    """Download one after the other; what is there from an interrupted pull is not fetched again."""
    done, total = 0, sum(files.sizes.values())
    for name, size in files.sizes.items():
        report(Progress("download", done, total, name))
        with _hub_errors(files.repo), own_progress_only():
            hf_hub_download(
                files.repo,
                name,
                revision=files.commit,
                local_dir=folder,
                endpoint=endpoint,
                etag_timeout=SOCKET_SECONDS,
            )
        done += size
    report(Progress("download", done, total, files.repo))


def fetch_data_files(
    source: HubSource, *, endpoint: str | None = None
) -> tuple[Path, Path | None, Path | None]:
    """Return local paths of the training, validation and held-out file of a data set."""
    try:
        train = _fetch_data_file(source, source.train, endpoint)
        validation, held_out = (
            _fetch_data_file(source, name, endpoint) if name else None
            for name in (source.validation, source.held_out)
        )
    except HubUnreachable as error:
        raise DataError(
            f"{error.message} Or give the same rows as a file: --set data.path=FILE.csv, and "
            "--set data.held_out_path=FILE.csv for the ones to hold out."
        ) from error
    return train, validation, held_out


def _fetch_data_file(source: HubSource, name: str, endpoint: str | None) -> Path:
    with _hub_errors(source.repo), own_progress_only():
        path = hf_hub_download(
            source.repo,
            name,
            repo_type="dataset",
            revision=source.revision,
            endpoint=endpoint,
            etag_timeout=SOCKET_SECONDS,
        )
    return Path(path)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn everything a Hub that is absent or unwilling causes into HubUnreachable."""
    try:
        yield
    except (httpx.HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubUnreachable(f"{repo} cannot be fetched from the Hub: {reason}") from error


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """Run `ask`, and give up after `seconds`: a silent name server ignores socket timeouts."""
    outcome: list[tuple[Any, Exception | None]] = []

    def run() -> None:
        try:
            outcome.append((ask(), None))
        except Exception as error:  # handed to the caller below
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="hub-answer")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
