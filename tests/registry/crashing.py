"""What the crash tests run in other processes: `python -m tests.registry.crashing COMMAND …`."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from registry.adapter import AdapterName
from registry.base import Bases
from registry.errors import WardrobeError
from registry.store import Registry
from tests.registry.making import BASE_ID, adapter_tensors, make_adapter

NAME = AdapterName.parse("acme/support")
ACK = "pushed and acknowledged"


def work(root: Path, log: Path, seed: int) -> None:
    """Push adapters and prompts and move the alias for ever; note each acknowledged one."""
    folder, rng = make_adapter(root / f"work-{seed}"), np.random.default_rng(seed)
    prompt = root / f"prompt-{seed}"
    prompt.mkdir()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"\n")  # what a killed worker left half written stays a line by itself

    def acknowledge(what: str, number: int, key: str) -> None:
        os.write(descriptor, json.dumps([what, number, key]).encode() + b"\n")
        os.fsync(descriptor)

    with Registry.open(root / "home", Bases(root / "bases")) as registry:
        while True:
            content = int(rng.integers(1 << 40))
            if content % 2:
                save_file(adapter_tensors(content), folder / "adapter_model.safetensors")
            else:
                card = {
                    "kind": "prompt",
                    "base": {"id": BASE_ID},
                    "prompt": {"system": f"{content}"},
                }
                (prompt / "wardrobe.json").write_text(json.dumps(card))
            source = folder if content % 2 else prompt
            version = registry.push(source, NAME, actor="test").version
            acknowledge("push", version.number, version.digest)
            move = registry.promote(NAME, version.number, reason="test", actor="test")
            acknowledge("promote", move.alias.number, str(move.alias.generation))
            if rng.random() < 0.3 and version.number > 1:
                move = registry.rollback(NAME, reason="test", actor="test")
                acknowledge("rollback", move.alias.number, str(move.alias.generation))


def acknowledged(log: Path) -> list[list[Any]]:
    """What the workers noted. A line that a kill tore was not acknowledged."""
    notes = []
    for line in log.read_text().splitlines() if log.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            notes.append(json.loads(line))
    return notes


def zygote(root: Path, log: Path) -> None:
    """Fork a worker for each seed that is read: killed workers cost no interpreter start."""
    for line in sys.stdin:
        worker = os.fork()
        if worker == 0:
            work(root, log, int(line))
        print(worker, flush=True)
        os.waitpid(worker, 0)


def push_once(root: Path, folder: Path) -> None:
    """Push and then say so in one write, which a system call trace shows."""
    with Registry.open(root / "home", Bases(root / "bases")) as registry:
        try:
            registry.push(folder, NAME, actor="test")
        except WardrobeError as error:
            sys.exit(f"{error.code}: {error.message}")
        os.write(1, ACK.encode())


def push_many(root: Path, seeds: str) -> None:
    """Push the content of each seed once and print digest and number."""
    with Registry.open(root / "home", Bases(root / "bases")) as registry:
        for seed in map(int, seeds.split(",")):
            folder = make_adapter(root / f"{os.getpid()}-{seed}", seed=seed)
            push = registry.push(folder, NAME, actor="test")
            print(json.dumps([seed, push.version.number, push.version.digest, push.created]))


if __name__ == "__main__":
    command, root, *rest = sys.argv[1:]
    if command == "zygote":
        zygote(Path(root), Path(rest[0]))
    elif command == "push":
        push_once(Path(root), Path(rest[0]))
    else:
        push_many(Path(root), rest[0])
