"""`make demo`: watch wardrobe do its job on a real base model, through its own commands and HTTP.

Every step runs the command a user would type (and prints it), in a home of its own, `.demo`.
Nothing is thrown away: a second run finds the base, the adapters and the versions there already.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from training.data.builders.icd10 import Icd10Options, build_icd10
from training.data.examples import Example

ROOT = Path(__file__).parent
SMART_HOME = "home/smart-home"
ICD10 = "clinic/icd-10"
# v1 of the smart-home adapter: stopped early and judged on fewer items, for v2 to beat
DRAFT = ("train.steps=25", "data.held_out_limit=40")

QUESTIONS = (
    (SMART_HOME, "turn on the lights in the kitchen"),
    (SMART_HOME, "set the brightness of the bedroom lights to 40 percent"),
    (ICD10, "Acute bronchitis due to streptococcus"),
    (ICD10, "Nontoxic diffuse goiter"),
)

CROWD = 24  # users of an experiment who ask at once
SCOPES = ("infer", "read", "feedback", "push", "experiments")  # of each tenant's key
COMPLAINT = "complaint:binary:lower"
SYSTEM = "Name the ICD-10 chapter of the diagnosis."
FEW_SHOT = {"kind": "prompt", "base": {"id": "HuggingFaceTB/SmolLM2-135M-Instruct"}}

console = Console(highlight=False)


def say(text: str) -> None:
    console.print(f"\n[bold cyan]▌[/] [bold]{text}[/]")


def wardrobe(home: Path, *arguments: str, quiet: bool = False) -> str:
    """Run one wardrobe command the way a user would; its progress goes to this terminal."""
    if not quiet:
        console.print(f"[dim]$ wardrobe {shlex.join(arguments)}[/]", soft_wrap=True)
    command = [sys.executable, "-m", "wardrobe", *arguments]
    environment = os.environ | {"WARDROBE_HOME": str(home)}
    wanted = subprocess.PIPE if quiet else None
    done = subprocess.run(command, env=environment, stdout=wanted, text=True, cwd=ROOT, check=False)  # noqa: S603 - our own command
    if done.returncode != 0:
        raise SystemExit(f"`wardrobe {' '.join(arguments)}` ended with {done.returncode}")
    return done.stdout or ""


def versions(home: Path, name: str) -> list[dict[str, Any]]:
    return json.loads(wardrobe(home, "show", name, "--json", quiet=True))["versions"]


@dataclass(slots=True)
class Server:
    """The demo's own server process: started detached, so that it may outlive this script."""

    home: Path
    port: int
    key: str
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def operator_key(home: Path) -> str:
    """Keep the operator key of this demo in a file that only its owner reads."""
    path = home / "operator.key"
    if not path.exists():
        write_key(path, json.loads(wardrobe(home, "key", "rotate", "--json", quiet=True))["key"])
    return path.read_text().strip()


def write_key(path: Path, key: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(key)


def stop_server(home: Path) -> None:
    """End the server of an earlier run, if the process of the pid file still is that server."""
    record = home / "server.json"
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        pid = json.loads(record.read_text())["pid"]
        command_line = Path(f"/proc/{pid}/cmdline")
        if not command_line.exists() or str(home).encode() in command_line.read_bytes():
            os.kill(pid, signal.SIGTERM)
            wait_for_exit(pid)
    record.unlink(missing_ok=True)


def wait_for_exit(pid: int) -> None:
    for _ in range(300):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def client_of(server: Server, key: str) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120)


def free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return listener.getsockname()[1]
    raise SystemExit("no free port on 127.0.0.1")


def start_server(home: Path, wanted_port: int) -> Server:
    stop_server(home)
    key, port = operator_key(home), free_port(wanted_port)
    arguments = ["serve", "--home", str(home), "--port", str(port)]
    console.print(f"[dim]$ wardrobe {' '.join(arguments)}[/]")
    with (home / "server.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "wardrobe", *arguments],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
        )
    (home / "server.json").write_text(json.dumps({"pid": process.pid, "port": port}))
    server = Server(home, port, key, process.pid)
    with console.status("the server loads the base model"):
        wait_ready(server, process)
    return server


def wait_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            log = (server.home / "server.log").read_text()[-2000:]
            raise SystemExit(f"the server ended at start:\n{log}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready in 60 s; see {server.home / 'server.log'}")


def train_and_push(home: Path) -> None:
    say("1. The base model: pulled once, frozen for ever")
    wardrobe(home, "base", "pull")
    say("2. Two domains, two adapters: trained, evaluated on held-out groups, pushed")
    if not versions_or_none(home, SMART_HOME):
        draft = [word for setting in DRAFT for word in ("--set", setting)]
        wardrobe(home, "train", "adapters/smart-home", *draft, "--push")
        console.print("  Its gate says no. Forced, with a reason that stays in the history:")
        reason = ("--force", "--reason", "a first version, until the real one is trained")
        wardrobe(home, "promote", f"{SMART_HOME}@v1", *reason)
    wardrobe(home, "train", "adapters/smart-home", "--push")
    wardrobe(home, "train", "adapters/icd-10", "--push", "--promote")
    wardrobe(home, "list")


def versions_or_none(home: Path, name: str) -> list[dict[str, Any]]:
    listed = json.loads(wardrobe(home, "list", "--json", quiet=True))
    return versions(home, name) if name in {row["name"] for row in listed} else []


async def ask(client: httpx.AsyncClient, model: str, text: str) -> tuple[str, str]:
    """Return (answer, what ran)."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 48,
    }
    answer = await client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    content = answer.json()["choices"][0]["message"]["content"]
    return content.strip().replace("\n", " "), answer.headers["x-adapter"]


async def side_by_side(server: Server) -> None:
    """Ask everything at once: adapters and base share one batch of one model."""
    say("3. One model, one batch: each request wears its own adapter, or none")
    async with client_of(server, server.key) as client:
        newest = f"{SMART_HOME}@v{versions(server.home, SMART_HOME)[-1]['number']}"
        models = ("base", newest, ICD10)
        pairs = [(model, text) for _, text in QUESTIONS for model in models]
        answers = await asyncio.gather(*(ask(client, model, text) for model, text in pairs))
    by_pair = dict(zip(pairs, answers, strict=True))
    table = Table(show_lines=True)
    for header in ("question", *models):
        table.add_column(header, overflow="fold")
    for name, text in QUESTIONS:
        answers_by_model = [(model, by_pair[model, text][0]) for model in models]
        table.add_row(
            text,
            *(
                f"[bold green]{escape(answer)}[/]"
                if model.startswith(name)
                else escape(answer[:90])
                for model, answer in answers_by_model
            ),
        )
    console.print(table)


@dataclass(slots=True)
class Stream:
    """A long answer in flight: which version it said it runs on, and what has come."""

    label: str = ""
    tokens: int = 0
    finished: bool = False
    started: asyncio.Event = field(default_factory=asyncio.Event)


async def long_stream(client: httpx.AsyncClient, stream: Stream) -> None:
    body = {
        "model": SMART_HOME,
        "messages": [{"role": "user", "content": "turn on the lights in the kitchen"}],
        "max_tokens": 200,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        stream.label = answer.headers["x-adapter"]
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                stream.tokens += 1
                if stream.tokens > 5:
                    stream.started.set()
            stream.finished |= line == "data: [DONE]"


async def label_now(client: httpx.AsyncClient) -> str:
    body = {"model": SMART_HOME, "prompt": "hello", "max_tokens": 1, "temperature": 0}
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return answer.headers["x-adapter"]


async def flip(client: httpx.AsyncClient, home: Path, *command: str) -> None:
    """Move the alias with a command while streams run; show what old and new requests wear."""
    streams = [Stream() for _ in range(4)]
    tasks = [asyncio.create_task(long_stream(client, stream)) for stream in streams]
    await asyncio.gather(*(stream.started.wait() for stream in streams))
    await asyncio.to_thread(wardrobe, home, *command)
    now = await label_now(client)
    still = sum(not task.done() for task in tasks)
    await asyncio.gather(*tasks)
    finished = sum(stream.finished for stream in streams)
    labels = sorted({stream.label for stream in streams})
    console.print(
        f"  new requests wear [bold green]{now}[/]; the 4 streams that were running "
        f"({still} still ran at the flip) finished on [bold]{', '.join(labels)}[/]: {finished}/4"
    )


async def promote_and_roll_back(server: Server) -> None:
    newest = versions(server.home, SMART_HOME)[-1]["number"]
    say(f"4. A promote and a rollback under running streams: v1 → v{newest} → v1")
    async with client_of(server, server.key) as client:
        if not (await label_now(client)).endswith("@v1"):
            first = ("promote", f"{SMART_HOME}@v1", "--force", "--reason", "start of the demo")
            wardrobe(server.home, *first, quiet=True)
        promote = ("promote", f"{SMART_HOME}@v{newest}", "--reason", "better on held-out groups")
        await flip(client, server.home, *promote)
        await flip(client, server.home, "rollback", SMART_HOME, "--reason", "showing the way back")
        wardrobe(server.home, *promote)


def tenant_key(home: Path, tenant: str) -> str:
    """Keep a tenant's key like the operator's: in a file that only its owner reads."""
    path = home / f"{tenant}.key"
    if not path.exists():
        scopes = [word for scope in SCOPES for word in ("--scope", scope)]
        made = json.loads(wardrobe(home, "key", "create", tenant, *scopes, "--json", quiet=True))
        write_key(path, made["key"])
    return path.read_text().strip()


async def two_tenants(server: Server) -> str:
    """Show what each tenant's key sees; return the clinic's."""
    say("5. Two tenants, a key each: what belongs to the other one is not there")
    keys = {tenant: tenant_key(server.home, tenant) for tenant in ("home", "clinic")}
    for tenant, key in keys.items():
        async with client_of(server, key) as client:
            seen = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
            asked = {"model": SMART_HOME, "prompt": "hello", "max_tokens": 1}
            status = (await client.post("/v1/completions", json=asked)).status_code
        names = ", ".join(sorted({name.partition("@")[0] for name in seen}))
        console.print(f"  the key of {tenant} sees {names}; {SMART_HOME} answers it {status}")
    return keys["clinic"]


@dataclass(slots=True)
class Crowd:
    """A clinic's simulated users: each asks for a chapter, and says when the answer was wrong."""

    client: httpx.AsyncClient
    items: Sequence[Example]
    asked: int = 0
    failed: int = 0

    async def decide(self, experiment: str, most: int) -> dict[str, Any]:
        """Let users come until the server ends the experiment; return its report."""
        while True:
            report = (await self.client.get(f"/v1/experiments/{experiment}")).json()
            if report["state"] != "running" or self.asked >= most:
                return report
            users = range(self.asked, self.asked + CROWD)
            await asyncio.gather(*(self._user(experiment, number) for number in users))
            self.asked += CROWD

    async def _user(self, experiment: str, number: int) -> None:
        example = self.items[number % len(self.items)]
        body = {
            "model": ICD10,
            "messages": [{"role": "user", "content": example.turns[-1].content}],
            "temperature": 0,
            "max_tokens": 6,  # of a title: enough to tell it from the others
        }
        unit = {"x-unit-key": f"{experiment} user {number}"}
        answer = await self.client.post("/v1/chat/completions", json=body, headers=unit)
        if not answer.is_success:
            self.failed += 1
        elif "x-arm" in answer.headers:
            said = answer.json()["choices"][0]["message"]["content"].strip()
            right = bool(said) and example.completion.startswith(said)
            what = {"request_id": answer.headers["x-request-id"], "value": 1}
            what["metric"] = "right" if right else "complaint"
            (await self.client.post("/v1/feedback", json=what)).raise_for_status()


async def push(client: httpx.AsyncClient, files: Mapping[str, bytes]) -> int:
    """Push files as the clinic's next version; what is there already keeps its number."""
    parts = {name: (name, content) for name, content in files.items()}
    pushed = await client.post(f"/v1/adapters/{ICD10}/versions", files=parts)
    pushed.raise_for_status()
    return pushed.json()["number"]


def files_of(home: Path, name: str) -> dict[str, bytes]:
    """Return the files of an adapter's newest version."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "pulled")
        newest = versions(home, name)[-1]["number"]
        wardrobe(home, "pull", f"{name}@v{newest}", str(out), quiet=True)
        return {path.name: path.read_bytes() for path in out.iterdir()}


async def begin(client: httpx.AsyncClient, treatment: int, exposure: float, **more: Any) -> str:
    design = {"treatments": [f"@v{treatment}"], "metric": "right:binary", **more}
    made = await client.post(f"/v1/adapters/{ICD10}/experiments", json=design)
    made.raise_for_status()
    path = f"/v1/experiments/{made.json()['id']}"
    move = {"reason": "the demo", "exposure": exposure}
    (await client.post(f"{path}/start", json=move)).raise_for_status()
    return made.json()["id"]


def show(report: dict[str, Any], crowd: Crowd) -> None:
    table = Table("arm", "version", "units", *(m["name"] for m in report["metrics_declared"]))
    for number, arm in enumerate(report["arms"]):
        read = [m for m in report["metrics"] if number == 0 or m["arm"] == arm["label"]]
        side = "treated" if number else "control"
        values = (f"{m[side]:.3g}" for m in read)
        table.add_row(arm["label"], arm["version"], str(report["units"][number]), *values)
    console.print(table)
    last = report["decisions"][-1]
    console.print(
        f"  [bold]{last['action']}[/] by {last['actor']}: {escape(last['reason'])}\n"
        f"  {crowd.asked} users asked, {crowd.failed} requests failed"
    )


async def let_users_decide(server: Server, key: str) -> None:
    """Compare LoRA with few-shot, and let a wrong version be taken back, on the clinic's users."""
    items = build_icd10(Icd10Options(categories_per_chapter=20), seed=1)
    random.Random(1).shuffle(items)  # noqa: S311 - who asks what, not a secret
    async with client_of(server, key) as client:
        say("6. An A/B test: the LoRA in production against a few-shot prompt")
        shots = [[example.turns[-1].content, example.completion] for example in items[-2:]]
        card = FEW_SHOT | {"prompt": {"system": SYSTEM, "examples": shots}}
        few_shot = await push(client, {"wardrobe.json": json.dumps(card).encode()})
        crowd = Crowd(client, items)
        shown = {"signals": [COMPLAINT]}
        show(await crowd.decide(await begin(client, few_shot, 1.0, **shown), 480), crowd)
        say("7. A bad version: the smart-home adapter, pushed under the clinic's name")
        wrong = await push(client, files_of(server.home, SMART_HOME))
        crowd = Crowd(client, items)
        guarded = {"guardrails": [COMPLAINT, "errors"]}
        show(await crowd.decide(await begin(client, wrong, 0.5, **guarded), 480), crowd)


def what_next(server: Server) -> None:
    text = f"""The server runs at {server.url} (pid {server.pid}, log {server.home}/server.log).

export WARDROBE_HOME={server.home} KEY=$(cat {server.home}/operator.key)
curl {server.url}/v1/chat/completions -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \\
  -d '{{"model": "{SMART_HOME}", "messages": [{{"role": "user", "content": "open the garage door"}}]}}'

from openai import OpenAI
client = OpenAI(base_url="{server.url}/v1", api_key=open("{server.home}/operator.key").read())
print(client.chat.completions.create(model="{ICD10}", temperature=0,
      messages=[{{"role": "user", "content": "Type 2 diabetes mellitus"}}]).choices[0].message.content)

.venv/bin/wardrobe show {SMART_HOME}      versions, aliases, what each server runs
.venv/bin/wardrobe history {SMART_HOME}   who moved what, when and why
make demo ARGS=--stop                     ends the server"""
    say("Try next")
    # As it stands, and not wrapped: these lines are there to be copied.
    console.print(text, markup=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--home", type=Path, default=ROOT / ".demo", help="where the demo keeps its store"
    )
    parser.add_argument("--port", type=int, default=8000, help="taken if it is free")
    parser.add_argument("--no-serve", action="store_true", help="end the server at the end")
    parser.add_argument("--stop", action="store_true", help="only end the server of an earlier run")
    arguments = parser.parse_args()
    home = arguments.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    if arguments.stop:
        stop_server(home)
        return
    began = time.monotonic()
    train_and_push(home)
    server = start_server(home, arguments.port)
    try:
        asyncio.run(side_by_side(server))
        asyncio.run(promote_and_roll_back(server))
        clinic = asyncio.run(two_tenants(server))
        asyncio.run(let_users_decide(server, clinic))
    except BaseException:
        stop_server(home)
        raise
    console.print(f"\n[dim]{time.monotonic() - began:.0f} s in all[/]")
    if arguments.no_serve:
        stop_server(home)
    else:
        what_next(server)


if __name__ == "__main__":
    main()
