"""The builds of the compiled operators that this machine can run."""

import torch

from serving.engine.ops.native.target import runnable_targets

BUILDS = [(t, dtype) for dtype in (torch.float32, torch.bfloat16) for t in runnable_targets(dtype)]
NAMES = [f"{target.name}-{str(dtype)[6:]}" for target, dtype in BUILDS]
