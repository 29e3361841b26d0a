"""What a base model answered before: it never changes, so it is asked only once."""

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from registry.base import BaseModel
from registry.jsonfile import canonical
from training.evaluation.evaluate import Answer, Ask
from training.run import replace_file


def remembered(folder: Path, base: BaseModel, answer: Answer) -> Answer:
    """Return `answer` with what `base` says without an adapter kept in files under `folder`.

    Only the asks that are new, and those of adapters and other models, are passed on.
    """

    def run(
        model: BaseModel, asks: Sequence[Ask], max_new_tokens: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        if model.fingerprint != base.fingerprint:
            return answer(model, asks, max_new_tokens, done)
        path = folder / f"{_key(base, max_new_tokens)}.json"
        known = _read(path)
        names = [None if adapter else _name(prompt) for prompt, adapter in asks]
        missing = [place for place, name in enumerate(names) if name not in known]
        there = len(asks) - len(missing)
        done(there)
        if missing:
            new = [asks[place] for place in missing]
            outputs = answer(model, new, max_new_tokens, lambda count: done(there + count))
        else:
            outputs = []
        fresh = dict(zip(missing, outputs, strict=True))
        learned = {name: fresh[place] for place in missing if (name := names[place])}
        if learned:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(known | learned).encode())
        return [fresh[i] if i in fresh else known[name or ""] for i, name in enumerate(names)]

    return run


def _key(base: BaseModel, max_new_tokens: int) -> str:
    facts = {"base": base.fingerprint, "tokens": max_new_tokens, "torch": version("torch")}
    return hashlib.sha256(canonical(facts)).hexdigest()[:16]


def _name(prompt: tuple[int, ...]) -> str:
    return hashlib.sha256(canonical(list(prompt))).hexdigest()[:32]


def _read(path: Path) -> dict[str, list[int]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
