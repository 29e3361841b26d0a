"""One client, no adapters: our server over HTTP and llama.cpp in process, in turn.

    python -m benchmarks.llamacpp BASE-bf16.gguf [--repeats 5]

Needs the package llama-cpp-python, compiled on this machine (`CMAKE_ARGS=-DGGML_NATIVE=ON pip
install llama-cpp-python`), and the same base as GGUF in bfloat16. libllama is called without HTTP,
JSON or a second process, which favours it. Both get all cores, the same prompts as token ids, and
answer with 64 greedy tokens; every second round goes the other way round.
"""

import argparse
import asyncio
import ctypes
import os
import tempfile
import time
from pathlib import Path

import aiohttp
import numpy as np
from rich.progress import Progress

from benchmarks.throughput import (
    NO_PREFIX_CACHE,
    one_request,
    running_server,
    setup_line,
    table,
)
from benchmarks.workload import OUTPUT_TOKENS, Cell, Figures, Record, prompts
from registry.base import Bases
from registry.home import default_cache
from registry.store import Registry

CELL = Cell(1, 0, 8)
CONTEXT = 512


class LlamaCpp:
    """libllama with one sequence, as its own server would hold it."""

    def __init__(self, gguf: Path) -> None:
        try:
            import llama_cpp  # pyright: ignore[reportMissingImports]  # compiled by who measures
        except ModuleNotFoundError as error:
            raise SystemExit("There is no package llama-cpp-python in this environment.") from error
        self._lib = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)  # called as long as it lives
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p())
        self._model = llama_cpp.llama_model_load_from_file(
            os.fsencode(gguf), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot read {gguf}.")
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = CONTEXT
        wanted.n_threads = wanted.n_threads_batch = os.cpu_count()
        wanted.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, wanted)
        self._batch = llama_cpp.llama_batch_init(CONTEXT, 0, 1)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def answer(self, prompt: list[int]) -> Record:
        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_seq_rm(memory, 0, -1, -1)
        record = Record(time.perf_counter())
        token = self._next(prompt, 0)
        for position in range(len(prompt), len(prompt) + OUTPUT_TOKENS):
            record.events.append(time.perf_counter())
            record.tokens += 1
            if record.tokens < OUTPUT_TOKENS:
                token = self._next([token], position)
        return record

    def _next(self, tokens: list[int], start: int) -> int:
        """Read tokens that begin at a position; return the most likely one behind them."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(tokens) - 1
        if status := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gave {status}")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax())


async def ask(url: str, texts: list[list[int]]) -> Figures:
    async with aiohttp.ClientSession() as session:
        began = time.perf_counter()
        records = [await one_request(session, url, text, "base", OUTPUT_TOKENS) for text in texts]
        return Figures.of(records, time.perf_counter() - began)


def measure(url: str, llama: LlamaCpp, pool: list[list[int]], repeats: int) -> str:
    ours: list[Figures] = []
    theirs: list[Figures] = []

    def we(texts: list[list[int]]) -> None:
        ours.append(asyncio.run(ask(url, texts)))

    def they(texts: list[list[int]]) -> None:
        began = time.perf_counter()
        records = [llama.answer(text) for text in texts]
        theirs.append(Figures.of(records, time.perf_counter() - began))

    we(pool[:1])
    they(pool[:1])
    ours.clear()
    theirs.clear()
    with Progress() as progress:
        for i in progress.track(range(repeats), description="measuring"):
            texts = pool[1 + i * CELL.requests :][: CELL.requests]
            for turn in (we, they) if i % 2 == 0 else (they, we):
                turn(texts)
    ratios = (a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, theirs, strict=True))
    parts = ["wardrobe, over HTTP:", table({CELL: ours}), "llama.cpp, in process:"]
    parts += [table({CELL: theirs})]
    parts += ["wardrobe ÷ llama.cpp, by round: " + ", ".join(f"{ratio:.2f}" for ratio in ratios)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gguf", type=Path, help="the base in bfloat16")
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    bases = Bases(default_cache() / "bases")
    base, llama = bases.get(args.base), LlamaCpp(args.gguf)
    pool = prompts(str(base.path), 1 + args.repeats * CELL.requests, seed=0)
    with tempfile.TemporaryDirectory(prefix="wardrobe-bench-") as folder:
        with Registry.open(Path(folder), bases):
            pass  # an empty one
        with running_server(Path(folder), base.id, ["--no-auth", *NO_PREFIX_CACHE]) as url:
            result = measure(url, llama, pool, args.repeats)
    print(f"\n{setup_line(base, args.repeats)}\n\n{result}")


if __name__ == "__main__":
    main()
