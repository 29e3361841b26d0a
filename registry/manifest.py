"""The canonical manifest: what makes two versions the same. Its sha256 is the digest.

Metrics, lineage and the README stand beside a version and are not part of its identity; the
prompt is (system text and examples), because it changes the answers.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

from registry.adapter import Shot, Version
from registry.contents import CONFIG_NAME, MODEL_NAME, WEIGHTS_NAME
from registry.jsonfile import canonical
from registry.vectors import AnyConfig

_FILE_KEYS = {CONFIG_NAME: "config", WEIGHTS_NAME: "weights", MODEL_NAME: "model"}


def config_bytes(config: AnyConfig) -> bytes:
    """Write the resolved config as it is stored: the order of its patterns matters and is kept."""
    return (json.dumps(config.to_json(), indent=2, allow_nan=False) + "\n").encode("utf-8")


def manifest_digest(
    *,
    kind: str,
    base_id: str,
    base_fingerprint: str,
    files: Mapping[str, str],
    system_prompt: str,
    examples: Sequence[Shot],
) -> str:
    """Return the digest of a version; `files` maps names to the sha256 of the stored bytes.

    What a version does not have is not in its manifest.
    """
    manifest: dict[str, object] = {
        "format": 1,
        "kind": kind,
        "base": {"id": base_id, "fingerprint": base_fingerprint},
        "system_prompt": system_prompt,
    }
    manifest |= {key: files[name] for name, key in _FILE_KEYS.items() if name in files}
    if examples:
        manifest["examples"] = examples
    return hashlib.sha256(canonical(manifest)).hexdigest()


def digest_of(version: Version) -> str:
    """Compute the digest again from what a stored version says about itself."""
    return manifest_digest(
        kind=version.kind,
        base_id=version.base_id,
        base_fingerprint=version.base_fingerprint,
        files=version.files,
        system_prompt=version.system_prompt,
        examples=version.examples,
    )
