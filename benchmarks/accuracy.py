"""How far each body's bfloat16 logits are from transformers' in float32, on the same texts.

    python -m benchmarks.accuracy [--texts 32]

Of each text all but the last tokens are read as a prompt, those one at a time; the logits behind
each are compared. Bodies are the compiled operators, a build for each set of instructions that this
processor has, the torch operators, and transformers' own forward pass in bfloat16.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from benchmarks.engine_step import no_fetch
from benchmarks.throughput import cpu_name
from benchmarks.workload import prompts
from registry.base import BaseModel, Bases
from registry.home import default_cache
from serving.engine.boundary import GenerateRequest, SamplingParams
from serving.engine.build import assemble
from serving.engine.compiled_model import CompiledModel
from serving.engine.linear import CompiledLinear, Linear
from serving.engine.model import Model, Operators
from serving.engine.ops.native.library import load_library
from serving.engine.ops.native.target import runnable_targets
from serving.engine.sequence import Row
from serving.engine.sequence import Sequence as Request
from serving.engine.settings import EngineSettings
from serving.engine.spec import ModelSpec
from serving.engine.weights import read_weights

SINGLE = 8  # tokens at the end of a text that are read one at a time
LENGTH = 256

Logits = Callable[[list[int]], torch.Tensor]  # a text → [SINGLE + 1, vocab], float32


def through_transformers(folder: Path, dtype: torch.dtype) -> Logits:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()

    def logits(text: list[int]) -> torch.Tensor:
        return model(torch.tensor([text])).logits[0, -SINGLE - 1 :].float()

    return logits


def engine(model: CompiledModel | Model) -> Logits:
    settings = EngineSettings(max_running=1, kv_cache_bytes=1 << 28, prefix_cache_bytes=0)
    core = assemble(model, no_fetch, settings).core

    def logits(text: list[int]) -> torch.Tensor:
        prompt = text[:-SINGLE]
        request = Request(GenerateRequest("a", tuple(prompt), SamplingParams(temperature=0), None))
        request.kv_slot = 0
        rows = [core.runner.run([Row(request, 0, len(prompt))])[0]]
        for place, token in enumerate(text[-SINGLE:], start=len(prompt)):
            request.tokens.append(token)
            request.computed = place
            rows.append(core.runner.run([Row(request, place, 1)])[0])
        return torch.cat(rows).float()

    return logits


def bodies(base: BaseModel) -> Iterator[tuple[str, Logits]]:
    spec, dtype, device = ModelSpec.read(base.path), torch.bfloat16, torch.device("cpu")
    for target in runnable_targets(dtype):
        library = load_library(dtype, default_cache() / "operators", target)
        weights = read_weights(base.path, spec, dtype, device, partial(CompiledLinear, library))
        yield f"C++ ({target.name})", engine(CompiledModel(spec, weights, library, LENGTH))
    weights = read_weights(base.path, spec, dtype, device, Linear)
    yield "torch", engine(Model(spec, weights, Operators(), LENGTH, "torch"))
    yield "transformers", through_transformers(base.path, dtype)


def report(exact: Sequence[torch.Tensor], found: dict[str, list[torch.Tensor]]) -> str:
    lines = [
        "| body | mean distance of a logit | largest | KL divergence | same most likely token |",
        "|---|---|---|---|---|",
    ]
    wanted = torch.cat(list(exact))
    for name, logits in found.items():
        own = torch.cat(logits)
        distance, same = (own - wanted).abs(), own.argmax(-1) == wanted.argmax(-1)
        log_p, log_q = wanted.log_softmax(-1), own.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        lines.append(
            f"| {name} | {distance.mean():.4f} | {distance.max():.2f} | {divergence:.2e} "
            f"| {100 * same.float().mean():.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--texts", type=int, default=32)
    options = parser.parse_args()
    base = Bases(default_cache() / "bases").get(options.base)
    texts = prompts(str(base.path), options.texts, seed=2)
    with torch.inference_mode(), Progress() as progress:
        read = through_transformers(base.path, torch.float32)
        exact = [read(text) for text in progress.track(texts, description="transformers, float32")]
        found = {
            name: [logits(text) for text in progress.track(texts, description=name)]
            for name, logits in bodies(base)
        }
    print(
        f"\n{cpu_name() or platform.machine()}, torch {torch.__version__}, base {base.id}, "
        f"{len(texts)} texts, {SINGLE + 1} positions of each, {time.strftime('%F')}\n"
    )
    print(report(exact, found))


if __name__ == "__main__":
    main()
