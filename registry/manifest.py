"""The canonical manifest: what makes two versions the same. Its sha256 is the digest.

Metrics, lineage and the README stand beside a version and are not part of its identity; the
system prompt is, because it changes the answers.
"""

import hashlib
import json
from collections.abc import Mapping

from registry.adapter import Version
from registry.jsonfile import canonical
from registry.lora import AdapterConfig
from registry.upload import CONFIG_NAME, WEIGHTS_NAME


def config_bytes(config: AdapterConfig) -> bytes:
    """Write the resolved config as it is stored: the order of its patterns matters and is kept."""
    return (json.dumps(config.to_json(), indent=2, allow_nan=False) + "\n").encode("utf-8")


def manifest_digest(
    *,
    kind: str,
    base_id: str,
    base_fingerprint: str,
    files: Mapping[str, str],
    system_prompt: str,
) -> str:
    """Return the digest of a version; `files` maps names to the sha256 of the stored bytes."""
    manifest = {
        "format": 1,
        "kind": kind,
        "base": {"id": base_id, "fingerprint": base_fingerprint},
        "config": files[CONFIG_NAME],
        "weights": files[WEIGHTS_NAME],
        "system_prompt": system_prompt,
    }
    return hashlib.sha256(canonical(manifest)).hexdigest()


def digest_of(version: Version) -> str:
    """Compute the digest again from what a stored version says about itself."""
    return manifest_digest(
        kind=version.kind,
        base_id=version.base_id,
        base_fingerprint=version.base_fingerprint,
        files=version.files,
        system_prompt=version.system_prompt,
    )
