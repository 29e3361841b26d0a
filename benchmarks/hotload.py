"""What a new adapter costs: its own first token, and the streams that run meanwhile, over HTTP.

    python -m benchmarks.hotload [--trials 10] [--streams 8] [--out FILE.json] [--plot FILE]

Each trial takes adapters that the server has not touched since they were pushed. Idle: a request
for one, beside the same request for one that is in a slot. Busy: while the streams run on resident
adapters, a request to a resident one (the control: what any new request costs them), and a load
call for a new one and the same request for it at once: in how many parts a prompt is read depends
on its length. In every other trial the new one comes first. Last, one is pushed over HTTP and asked
for.

A gap is the longest time between two tokens of one stream. The load does not stall the streams when
their gap is not above that of the control.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path

import aiohttp
from rich.progress import Progress

from benchmarks.plots import Plot, add_option, draw_dots
from benchmarks.throughput import running_server, setup_line, write_adapter
from benchmarks.workload import prompts
from registry.adapter import AdapterName
from registry.base import BaseModel, Bases
from registry.home import default_cache
from registry.store import Registry

RESIDENT = 8  # adapters that the streams wear
STREAM_TOKENS = 2000  # more than a trial takes on any machine: they are broken off
PAST_PREFILL = 40  # tokens after which a stream has nothing to do with its prompt any more
ANSWER_TOKENS = 8
SETTLED = 1.2  # seconds after which what came before makes no step longer any more
SHORT = 16  # tokens of the short prompt
TEXTS = 20  # prompts that one trial takes; of one that came before its keys and values are kept
FRESH = 5  # adapters that one trial takes; the last one is pushed in it

Times = list[float]  # seconds, monotonic


@dataclass(frozen=True, slots=True)
class Trial:
    """Milliseconds of one trial; a gap is the longest between two tokens of a running stream."""

    idle_short: float  # first token of an adapter on the disk, short prompt
    idle_short_control: float  # of one in a slot
    idle: float  # the same with a prompt of the workload
    idle_control: float
    step: float  # median time between two tokens of the streams, nothing else going on
    gap_quiet: float
    gap_control: float  # while a request to a resident adapter is answered
    gap_new: float  # from the load call to the end of the new adapter's answer
    load: float  # duration of the load call
    first_control: float  # busy: first token of the resident adapter
    first_new: float  # of the new one, since the load call was sent
    first_asked: float  # of one that is asked for without a load call
    first_pushed: float  # of one that is pushed over HTTP, since the push was sent


@dataclass(frozen=True, slots=True)
class Span:
    """A request beside the streams: when it began and ended, and its milliseconds."""

    start: float
    end: float
    first: float  # to the first token
    load: float  # of the load call before it


class Client:
    """Sends one trial after the other to a server; no adapter is asked for twice as a new one."""

    def __init__(
        self, session: aiohttp.ClientSession, made: Path, pool: Sequence[list[int]], streams: int
    ) -> None:
        self._session, self._made, self._pool, self._streams = session, made, pool, streams
        self._fresh = (f"a{number:02d}" for number in count(RESIDENT))

    async def touch(self) -> None:
        """Bring the resident adapters into their slots."""
        for number in range(RESIDENT):
            await self._first(resident(number), self._pool[-1 - number])

    async def trial(self, number: int) -> Trial:
        texts = self._pool[TEXTS * number : TEXTS * (number + 1)]
        short, long = texts[0][:SHORT], texts[1]
        idle_short_control = await self._first(resident(1), short)
        idle_short = await self._first(f"bench/{next(self._fresh)}", short[::-1])
        idle_control = await self._first(resident(1), long)
        idle = await self._first(f"bench/{next(self._fresh)}", texts[2])
        async with self._running(texts[3:-3]) as times:
            quiet = time.perf_counter()
            await asyncio.sleep(1.5)
            quiet_end = time.perf_counter()
            # A step reads more keys the longer the streams are: who comes second has longer gaps.
            spans: dict[bool, Span] = {}
            for is_new in (number % 2 == 1, number % 2 == 0):
                ask = self._loaded_and_asked if is_new else self._resident_asked
                start = time.perf_counter()
                first, load = await ask(texts[-1])
                spans[is_new] = Span(start, time.perf_counter(), first, load)
                await asyncio.sleep(SETTLED)
            first_asked = await self._first(f"bench/{next(self._fresh)}", texts[-2])
            await asyncio.sleep(0.5)
            start_push = time.perf_counter()
            label = await self._push(next(self._fresh))
            first_pushed = await self._first(label, texts[-3], since=start_push)
        control, new = spans[False], spans[True]
        return Trial(
            *(idle_short, idle_short_control, idle, idle_control),
            step=statistics.median(gaps(times, quiet, quiet_end)),
            gap_quiet=max(gaps(times, quiet, quiet_end)),
            gap_control=max(gaps(times, control.start, control.end)),
            gap_new=max(gaps(times, new.start, new.end)),
            load=new.load,
            first_control=control.first,
            first_new=new.first,
            first_asked=first_asked,
            first_pushed=first_pushed,
        )

    async def _resident_asked(self, prompt: list[int]) -> tuple[float, float]:
        return await self._first(resident(3), prompt), 0.0

    async def _loaded_and_asked(self, prompt: list[int]) -> tuple[float, float]:
        """Return the milliseconds to the new adapter's first token, and those of the load call."""
        name, start = next(self._fresh), time.perf_counter()
        await self._load(name)
        load = (time.perf_counter() - start) * 1e3
        return await self._first(name, prompt, since=start), load

    @contextlib.asynccontextmanager
    async def _running(self, texts: Sequence[list[int]]) -> AsyncIterator[list[Times]]:
        """Run the streams, all of them past their prompts; break them off afterwards."""
        times: list[Times] = [[] for _ in range(self._streams)]
        tasks = [
            asyncio.create_task(
                self._stream(resident(i), texts[i % len(texts)], STREAM_TOKENS, times[i])
            )
            for i in range(self._streams)
        ]
        while min(map(len, times)) < PAST_PREFILL:  # noqa: ASYNC110  # a list tells nobody
            await asyncio.sleep(0.05)
        yield times
        if ended := [task for task in tasks if task.done()]:
            raise SystemExit(f"{len(ended)} streams ended early: {ended[0].exception()}")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _first(self, model: str, prompt: list[int], since: float | None = None) -> float:
        """Return the milliseconds to the first token; reads the answer to its end."""
        since = since or time.perf_counter()
        times: Times = []
        await self._stream(model, prompt, ANSWER_TOKENS, times)
        return (times[0] - since) * 1e3

    async def _stream(self, model: str, prompt: list[int], tokens: int, times: Times) -> None:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True}
        async with self._session.post("/v1/completions", json=body) as answer:
            await check(answer)
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(f"error event: {event['error']}")
                    if not event["choices"][0]["finish_reason"]:
                        times.append(time.perf_counter())

    async def stages(self) -> str:
        """Return what the parts of loading took on average, as the server counts them."""
        async with self._session.get("/metrics") as answer:
            lines = [line.split() for line in (await answer.text()).splitlines()]
        found = {name: float(value) for name, value in (x for x in lines if len(x) == 2)}
        metric = "wardrobe_adapter_load_stage_seconds"
        times = {
            stage: 1e3
            * found[f'{metric}_sum{{stage="{stage}"}}']
            / found[f'{metric}_count{{stage="{stage}"}}']
            for stage in ("fetch", "read", "place")
        }
        return ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in times.items())

    async def _load(self, name: str) -> None:
        body = {"lora_name": name, "lora_path": f"bench/{name}"}
        async with self._session.post("/v1/load_lora_adapter", json=body) as answer:
            await check(answer)

    async def _push(self, name: str) -> str:
        """Push a folder of files over HTTP, and return what to call the version."""
        form = aiohttp.FormData()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            form.add_field(file, (self._made / name / file).read_bytes(), filename=file)
        async with self._session.post(f"/v1/adapters/pushed/{name}/versions", data=form) as answer:
            await check(answer)
            return (await answer.json())["id"]


def resident(number: int) -> str:
    return f"bench/a{number % RESIDENT:02d}"


async def check(answer: aiohttp.ClientResponse) -> None:
    if answer.status not in (200, 201):
        raise RuntimeError(f"HTTP {answer.status}: {(await answer.text())[:200]}")


def gaps(times: Sequence[Times], start: float, end: float) -> list[float]:
    """Return the milliseconds between tokens of a stream that overlap a span of time."""
    return [
        (late - early) * 1e3
        for stream in times
        for early, late in pairwise(stream)
        if late > start and early < end
    ]


def fill_registry(home: Path, base: BaseModel, bases: Bases, trials: int) -> None:
    """Push what the trials will need; what they push themselves is only made."""
    total = RESIDENT + FRESH * trials
    with Registry.open(home, bases) as registry, Progress(transient=True) as progress:
        for number in progress.track(range(total), description="making adapters"):
            name = AdapterName.parse(f"bench/a{number:02d}")
            write_adapter(home / "made" / name.name, base, seed=3000 + number)
            if number < RESIDENT or (number - RESIDENT) % FRESH != FRESH - 1:
                pushed = registry.push(home / "made" / name.name, name, actor="benchmark")
                registry.promote(name, pushed.version.number, reason="benchmark", actor="benchmark")


async def measure(
    url: str, made: Path, pool: Sequence[list[int]], trials: int, streams: int
) -> tuple[list[Trial], str]:
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        client = Client(session, made, pool, streams)
        await client.touch()
        with Progress() as progress:
            done = [
                await client.trial(number)
                for number in progress.track(range(trials), description="measuring")
            ]
        return done, await client.stages()


def report(trials: Sequence[Trial]) -> str:
    lines = [f"| ms over {len(trials)} trials | median | min | max |", "|---|---|---|---|"]
    for name in Trial.__dataclass_fields__:
        values = [getattr(trial, name) for trial in trials]
        lines.append(
            f"| {name.replace('_', ' ')} | {statistics.median(values):.1f} | {min(values):.1f} "
            f"| {max(values):.1f} |"
        )

    def ratio(above: str, below: str) -> float:
        return statistics.median(getattr(t, above) / getattr(t, below) for t in trials)

    return "\n".join(
        [
            *lines,
            "",
            f"The streams' gap with a new adapter is {ratio('gap_new', 'gap_control'):.2f} times "
            f"that of the control and {ratio('gap_new', 'step'):.1f} times the median step; the "
            f"control's is {ratio('gap_control', 'step'):.1f} times the step (medians).",
        ]
    )


def draw_trials(trials: Sequence[Trial], plot: Plot) -> None:
    rows = {
        "idle, short prompt: a new one's first token": "idle_short",
        "the same, one in a slot": "idle_short_control",
        "beside streams: first token since the load call": "first_new",
        "since a push over HTTP": "first_pushed",
        "one in a slot": "first_control",
        "longest gap of the streams: a new one": "gap_new",
        "one in a slot ": "gap_control",
        "nothing new": "gap_quiet",
        "their median step": "step",
    }
    values = {row: [getattr(t, name) for t in trials] for row, name in rows.items()}
    draw_dots(plot, "milliseconds", values)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--out", type=Path, help="also write every trial as JSON")
    add_option(parser)
    parser.add_argument("serve", nargs="*", help="after --: options handed to `wardrobe serve`")
    args = parser.parse_args()
    bases = Bases(default_cache() / "bases")
    base = bases.get(args.base)
    with tempfile.TemporaryDirectory(prefix="wardrobe-bench-") as folder:
        home = Path(folder)
        fill_registry(home, base, bases, args.trials)
        os.sync()  # or the system writes those hundreds of megabytes to the disk beside the trials
        pool = prompts(str(base.path), TEXTS * args.trials + RESIDENT, seed=1)
        with running_server(home, base.id, ["--no-auth", *args.serve]) as url:
            trials, stages = asyncio.run(
                measure(url, home / "made", pool, args.trials, args.streams)
            )
    print(f"\n{setup_line(base, args.trials)}\n\n{report(trials)}")
    print(f"\nA load took on average: {stages}.")
    if args.plot:
        draw_trials(trials, Plot(args.plot, setup_line(base, args.trials)))
    if args.out:
        args.out.write_text(json.dumps([asdict(trial) for trial in trials], indent=1))


if __name__ == "__main__":
    main()
