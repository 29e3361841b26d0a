"""The builds of the compiled operators that this machine can run."""

import torch

from serving.engine.ops.native.target import runnable_targets

RUNNABLE = runnable_targets(torch.bfloat16)
DTYPES = [torch.float32, torch.bfloat16]
