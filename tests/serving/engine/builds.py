"""The builds of the compiled operators that this machine can run."""

import torch

from serving.engine.ops.native.target import TARGETS, capabilities

HERE = capabilities()
RUNNABLE = [target for target in TARGETS if target.runs_on(HERE)]
DTYPES = [torch.float32, torch.bfloat16]
