"""Smart-home requests and the intent each one means, from `home-assistant-intents`.

The package holds sentence templates for 42 intents; the names of rooms and devices belong to each
home, so one home's names are listed here. A template is the group: a held-out request was written
from a template that training never saw.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hassil.intents import Intent, IntentData, Intents, TextSlotList

from training.data.builders.sentences import Grammar, Walk
from training.data.examples import Example, ask
from training.errors import RecipeError
from training.recipe import Count

PACKAGE = "home_assistant_intents"

AREAS = (
    "kitchen",
    "living room",
    "bedroom",
    "bathroom",
    "office",
    "hallway",
    "garage",
    "dining room",
    "basement",
    "nursery",
    "laundry room",
    "patio",
)
FLOORS = ("ground", "first", "second", "upper", "top")

# The names of devices by domain: a template that needs a lock is only given locks.
NAMES: Mapping[str, Sequence[str]] = {
    "binary_sensor": ("motion sensor", "smoke detector", "window sensor"),
    "button": ("doorbell", "restart button"),
    "climate": ("thermostat", "heat pump", "radiator"),
    "cover": ("left curtain", "garage door", "roller blind", "skylight"),
    "fan": ("ceiling fan", "tower fan"),
    "input_boolean": ("vacation mode", "guest mode"),
    "input_button": ("panic button",),
    "lawn_mower": ("mower", "robot mower"),
    "light": ("desk lamp", "floor lamp", "chandelier", "night light", "bedside lamp"),
    "lock": ("front door", "back door", "side gate"),
    "media_player": ("TV", "soundbar", "radio", "speaker"),
    "person": ("Alice", "Marcus", "Nadia", "Tom"),
    "scene": ("movie night", "good morning", "party"),
    "script": ("bedtime routine", "wake up script"),
    "sensor": ("outdoor sensor", "power meter", "humidity sensor"),
    "switch": ("coffee maker", "fountain", "Christmas tree"),
    "todo": ("grocery", "work", "packing"),
    "vacuum": ("vacuum", "robot cleaner"),
    "valve": ("sprinkler", "water valve"),
    "weather": ("weather station", "forecast"),
}
FREE_TEXT: Mapping[str, Sequence[str]] = {
    "message": ("dinner is ready", "time to leave", "the guests are here", "lights out soon"),
    "search_query": ("Abbey Road", "Bohemian Rhapsody", "jazz classics", "The Beatles", "Queen"),
    "shopping_list_item": ("milk", "eggs", "olive oil", "bread", "apples", "batteries"),
    "timer_command": ("open the garage door", "turn off the lights", "lock the front door"),
    "timer_name": ("pizza", "laundry", "tea", "workout", "pasta"),
    "todo_list_item": ("call the plumber", "passport", "water the plants", "buy stamps"),
    "zone": ("school", "work", "the gym"),
}


@dataclass(frozen=True, slots=True)
class HomeAssistantOptions:
    """What `[data.options]` may say."""

    intents: tuple[str, ...] = ()  # which of the 42; none named: all
    templates_per_intent: Count = 40  # timers and states have a hundred, others a handful
    sentences_per_template: Count = 2


def build_home_assistant(options: HomeAssistantOptions, seed: int) -> list[Example]:
    """Return requests with the minified JSON of their intent and slots."""
    path = resources.files(PACKAGE) / "data" / "en.json"
    intents = Intents.from_dict(json.loads(path.read_text(encoding="utf-8")))
    examples: list[Example] = []
    for name, intent in _chosen(intents, options.intents):
        rng = random.Random(f"{seed}:{name}")  # noqa: S311  # draws sentences, not secrets
        templates = [
            (block, number) for block in intent.data for number in range(len(block.sentence_texts))
        ]
        chosen = rng.sample(templates, min(len(templates), options.templates_per_intent))
        for block, number in chosen:
            grammar = _grammar(intents, block)
            examples += _sentences(
                name, block, number, grammar, rng, options.sentences_per_template
            )
    return examples


def _chosen(intents: Intents, names: Sequence[str]) -> list[tuple[str, Intent]]:
    for name in names:
        if name not in intents.intents:
            raise RecipeError(
                f"data.options.intents names {name!r}. Known: {', '.join(sorted(intents.intents))}."
            )
    wanted = sorted(names or intents.intents)
    return [(name, intents.intents[name]) for name in wanted]


def _grammar(intents: Intents, block: IntentData) -> Grammar:
    lists = {
        **intents.slot_lists,
        **{key: _list(values) for key, values in FREE_TEXT.items()},
        "area": _list(AREAS),
        "floor": _list(FLOORS),
        "name": _list(_names(block.requires_context.get("domain"))),
        **block.slot_lists,
    }
    return Grammar({**intents.expansion_rules, **block.expansion_rules}, lists)


def _list(values: Sequence[str]) -> TextSlotList:
    return TextSlotList.from_strings(values, allow_template=False)


def _names(domains: str | Sequence[str] | None) -> list[str]:
    """Return the names of the domains a template asks for; of all when it asks for none."""
    wanted = [domains] if isinstance(domains, str) else domains or sorted(NAMES)
    return [name for domain in wanted for name in NAMES[domain]]


def _sentences(
    intent: str,
    block: IntentData,
    number: int,
    grammar: Grammar,
    rng: random.Random,
    count: int,
) -> Iterator[Example]:
    """Yield up to `count` different sentences of one template."""
    seen: set[str] = set()
    template = block.sentences[number]
    group = f"{intent}: {block.sentence_texts[number]}"
    for _ in range(count * 5):  # a template without choices has one sentence only
        walk = Walk(grammar, rng)
        text = walk.sentence(template)
        if text not in seen:
            seen.add(text)
            yield ask(text, intent_json(intent, {**block.slots, **walk.slots}), group)
        if len(seen) == count:
            return


def intent_json(intent: str, slots: Mapping[str, Any]) -> str:
    """Write the one JSON text that means this intent: minified, slots by name."""
    value = {"intent": intent, "slots": dict(sorted(slots.items()))}
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
