"""The gate of a push, and adapter folders that it is to refuse."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from registry.base import Bases
from registry.errors import Refused
from registry.lora import AdapterConfig
from registry.upload import copy_upload
from registry.validate import Checked, validate
from tests.registry.making import adapter_tensors

Adapter = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"
F32 = np.float32
GOOD = save(adapter_tensors())


def gate(folder: Path, bases: Bases, tmp_path: Path, base: str | None = None) -> Checked:
    """Do what a push does before it stores anything."""
    staging = tmp_path / "staging"
    staging.mkdir()
    copy_upload(folder, staging)
    return validate(staging, bases, base=base)


def config_of(checked: Checked) -> AdapterConfig:
    assert isinstance(checked.config, AdapterConfig)
    return checked.config


def codes(error: pytest.ExceptionInfo[Refused]) -> set[str]:
    assert error.value.message
    return {code for code, _ in error.value.problems}


def refused(folder: Path, bases: Bases, tmp_path: Path) -> set[str]:
    with pytest.raises(Refused) as error:
        gate(folder, bases, tmp_path)
    return codes(error)


def with_value(name: str, index: int, value: float) -> dict[str, np.ndarray]:
    tensors = adapter_tensors()
    tensors[name].flat[index] = value
    return tensors
