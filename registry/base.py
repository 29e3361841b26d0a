"""Base models on this machine: a logical id, a folder of safetensors, and two fingerprints.

The *structure* fingerprint says whether an adapter fits (names and shapes of the tensors and the
architecture); the *weights* fingerprint says whether it was trained on these very weights.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model that has been pulled."""

    id: str  # logical id, for example HuggingFaceTB/SmolLM2-135M-Instruct
    path: Path  # config.json, tokenizer files and *.safetensors in plain dtypes
    fingerprint: str  # sha256 hex over every tensor's name, dtype, shape and bytes
    structure: str  # sha256 hex over every tensor's name and shape, and the architecture
    linears: dict[str, tuple[int, int]]  # module name → (out_features, in_features)
