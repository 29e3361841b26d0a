"""Examples from a file of templates: sentences with slots, and lists of what fills them.

    [slots]
    room = ["kitchen", "bedroom"]
    way = ["on", "off"]

    [[templates]]
    prompts = ["turn {way} the light in the {room}", "light {way} in the {room}"]
    completion = '{"room":"{room}","state":"{way}"}'

A slot has one value in the prompt and in the completion. Each wording is a group of its own.
"""

import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from training.data.examples import Example, ask
from training.errors import DataError

_SLOT = re.compile(r"\{(\w+)\}")
_Text = Annotated[str, Meta(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Wordings of one request, and the answer to it."""

    prompts: Annotated[tuple[_Text, ...], Meta(min_length=1)]
    completion: _Text

    def slots(self) -> Iterator[str]:
        for text in (*self.prompts, self.completion):
            yield from _SLOT.findall(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Templates:
    """The whole file."""

    templates: Annotated[tuple[Template, ...], Meta(min_length=1)]
    slots: dict[str, Annotated[tuple[_Text, ...], Meta(min_length=1)]]

    def draw(self, rng: random.Random) -> Example:
        """Return one example: a template, one of its wordings, and a value for each slot."""
        template = rng.choice(self.templates)
        wording = rng.choice(template.prompts)
        values = {name: rng.choice(self.slots[name]) for name in sorted(set(template.slots()))}
        return ask(_fill(wording, values), _fill(template.completion, values), group=wording)


def load_templates(path: Path) -> Templates:
    """Read a file of templates. Raises DataError saying what is wrong with it."""
    try:
        value: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        found = msgspec.convert(value, Templates)
    except FileNotFoundError:
        raise DataError(f"There is no file of templates at {path}.") from None
    except (ValueError, msgspec.ValidationError) as error:
        raise DataError(f"{path} is no file of templates: {error}.") from error
    for template in found.templates:
        for name in template.slots():
            if name not in found.slots:
                known = ", ".join(found.slots) or "none"
                raise DataError(f"{path} uses the slot {{{name}}}, and [slots] has {known}.")
    return found


def _fill(text: str, values: dict[str, str]) -> str:
    return _SLOT.sub(lambda match: values[match[1]], text)
