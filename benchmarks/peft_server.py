"""transformers and PEFT behind `/v1/completions`, as a peer for `benchmarks.peers`.

    python -m benchmarks.peft_server BASE PORT [NAME=FOLDER …]

What people have before they have a server for adapters: one `generate` for all requests that wait,
each row wearing its adapter by PEFT's `adapter_names`, or by `--one-by-one` a `generate` for the
rows of each adapter. A batch that runs takes nobody in. Tokens are streamed as they come.
"""

import argparse
import asyncio
import json
import os
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch
from aiohttp import web
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

MOST = 32  # rows of a batch
TOGETHER_SECONDS = 0.01  # from the first request of a batch until it begins


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and where its tokens go; None is the end."""

    prompt: list[int]
    adapter: str  # "" is the base
    tokens: int
    told: asyncio.Queue[int | None]
    loop: asyncio.AbstractEventLoop

    def tell(self, token: int | None) -> None:
        self.loop.call_soon_threadsafe(self.told.put_nowait, token)


class Rows(BaseStreamer):
    """Tells each row its tokens, as many as it wants; the first that come are the prompts."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        self._asked, self._step = asked, -1

    def put(self, value: torch.Tensor) -> None:
        self._step += 1
        if self._step:
            for row, token in zip(self._asked, value.tolist(), strict=True):
                if self._step <= row.tokens:
                    row.tell(token)

    def end(self) -> None:
        for row in self._asked:
            row.tell(None)


class Model:
    """One thread that generates for whoever waits."""

    def __init__(self, base: str, adapters: dict[str, str], *, one_by_one: bool) -> None:
        self._one_by_one, self.names = one_by_one, set(adapters)
        self._waiting: Queue[Asked] = Queue()
        # Any: the two packages hand out models that their own annotations do not know as such.
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, local_files_only=True
        )
        for name, folder in adapters.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(folder, _plain(name))
            else:
                self._model = PeftModel.from_pretrained(self._model, folder, _plain(name))
        self._model.to(torch.bfloat16).eval()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, asked: Asked) -> None:
        self._waiting.put(asked)

    def _work(self) -> None:
        torch.set_grad_enabled(False)
        while True:
            batch = [self._waiting.get()]
            time.sleep(TOGETHER_SECONDS)
            while len(batch) < MOST and not self._waiting.empty():
                batch.append(self._waiting.get())
            groups: dict[str, list[Asked]] = {}
            for asked in batch:
                groups.setdefault(asked.adapter if self._one_by_one else "", []).append(asked)
            try:
                for adapter, rows in groups.items():
                    self._generate(adapter, rows)
            except BaseException:  # nobody is answered any more: who waits should see an end
                traceback.print_exc()
                os._exit(1)

    def _generate(self, adapter: str, rows: Sequence[Asked]) -> None:
        longest = max(len(row.prompt) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[i, longest - len(row.prompt) :] = 1
        more: dict[str, Any] = {}
        if isinstance(self._model, PeftModel):
            if adapter:
                self._model.set_adapter(_plain(adapter))
            else:
                names = (_plain(row.adapter) if row.adapter else "__base__" for row in rows)
                more["adapter_names"] = list(names)
        tokens = max(row.tokens for row in rows)
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            streamer=Rows(rows),
            **more,
        )


def _plain(name: str) -> str:
    """Modules of torch have no dots in their names, and PEFT makes adapters' names such."""
    return name.replace("/", "_").replace(".", "_")


async def complete(request: web.Request, model: Model) -> web.StreamResponse:
    body = await request.json()
    name = body["model"]
    if name != "base" and name not in model.names:
        raise web.HTTPNotFound(text=f"no adapter {name!r}")
    told: asyncio.Queue[int | None] = asyncio.Queue()
    adapter = "" if name == "base" else name
    loop = asyncio.get_running_loop()
    model.ask(Asked(body["prompt"], adapter, body["max_tokens"], told, loop))
    answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await answer.prepare(request)
    count = 0
    while (token := await told.get()) is not None:
        count += 1
        choice = {"index": 0, "text": f" {token}", "finish_reason": None}
        await answer.write(_event({"choices": [choice]}))
    await answer.write(_event({"choices": [], "usage": {"completion_tokens": count}}))
    await answer.write(b"data: [DONE]\n\n")
    return answer


def _event(data: dict[str, object]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="folder of the base model")
    parser.add_argument("port", type=int, help="on the loopback address")
    parser.add_argument("adapters", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--one-by-one", action="store_true", help="a batch for each adapter")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    adapters = dict(text.split("=", 1) for text in options.adapters)
    model = Model(options.base, adapters, one_by_one=options.one_by_one)
    app = web.Application()
    app.router.add_post("/v1/completions", lambda request: complete(request, model))
    web.run_app(app, host="127.0.0.1", port=options.port, print=None)


if __name__ == "__main__":
    main()
