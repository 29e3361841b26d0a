"""The builds of the compiled operators that this machine can run."""

from functools import partial
from pathlib import Path

import torch

from registry.home import default_cache
from serving.engine.compiled_model import CompiledModel
from serving.engine.linear import CompiledLinear
from serving.engine.ops.native.library import load_library
from serving.engine.ops.native.target import Target, runnable_targets
from serving.engine.spec import ModelSpec
from serving.engine.weights import read_weights

BUILDS = [(t, dtype) for dtype in (torch.float32, torch.bfloat16) for t in runnable_targets(dtype)]
NAMES = [f"{target.name}-{str(dtype)[6:]}" for target, dtype in BUILDS]


@torch.inference_mode()
def read_compiled(base: Path, target: Target, dtype: torch.dtype, length: int) -> CompiledModel:
    """Read a base for one build, also where the engine would take a better one."""
    library = load_library(dtype, default_cache() / "operators", target)
    spec = ModelSpec.read(base)
    weights = read_weights(base, spec, dtype, torch.device("cpu"), partial(CompiledLinear, library))
    return CompiledModel(spec, weights, library, length)
