"""The card: what the maker of a version says about it, in `wardrobe.json` beside the weights."""

from typing import Any, cast

from registry.adapter import Kind
from registry.contents import CONTENTS
from registry.errors import Problem, Refused

CARD_NAME = "wardrobe.json"
MAX_CARD_BYTES = 1 << 20
MAX_SYSTEM_PROMPT = 32_768  # characters
MAX_EXAMPLES = 256
MAX_EXAMPLE_TEXT = 262_144  # characters of all examples together

# top-level field → its type; a nested object lists the fields that must be there
FIELDS: dict[str, type] = {
    "base": dict,
    "prompt": dict,
    "metrics": dict,
    "gate": dict,
    "lineage": dict,
    "recipe": dict,
    "kind": str,
    "created_by": str,
}


def check_card(card: dict[str, Any]) -> dict[str, Any]:
    """Return the card when it is well formed. Raises Refused with every problem in it."""
    problems = [
        ("card_unknown_field", f"{CARD_NAME} has the field {key[:60]!r}; known: {_known()}.")
        for key in card
        if key not in FIELDS
    ]
    for key, kind in FIELDS.items():
        # A recipe may be given by its name or written out.
        accepted = (dict, str) if key == "recipe" else kind
        if key in card and not isinstance(card[key], accepted):
            problems.append(_invalid(key, f"must be {_article(kind)}"))
    if not problems:
        problems = [*_check_base(card), *_check_prompt(card), *_check_gate(card)]
        if kind_of(card) not in CONTENTS:
            problems.append(_invalid("kind", f"must be one of {', '.join(CONTENTS)}"))
        elif kind_of(card) == "prompt" and not any(card.get("prompt", {}).values()):
            text = "of the kind 'prompt' needs a text in `system`, or `examples`, or both"
            problems.append(_invalid("prompt", text))
    if problems:
        raise Refused.because(problems)
    return card


def kind_of(card: dict[str, Any]) -> Kind:
    return cast("Kind", card.get("kind", "lora"))


def system_prompt(card: dict[str, Any]) -> str:
    return cast("str", card.get("prompt", {}).get("system", ""))


def _check_base(card: dict[str, Any]) -> list[Problem]:
    base = cast("dict[str, Any]", card.get("base", {}))
    unknown = set(base) - {"id", "fingerprint", "structure"}
    texts = all(isinstance(value, str) and len(value) <= 256 for value in base.values())
    if unknown or not texts:
        return [_invalid("base", "holds id, fingerprint and structure, each a short text")]
    return []


def _check_prompt(card: dict[str, Any]) -> list[Problem]:
    prompt = cast("dict[str, Any]", card.get("prompt", {}))
    problems: list[Problem] = []
    if unknown := set(prompt) - {"system", "examples"}:
        problems.append(_invalid("prompt", f"holds `system` and `examples`, not {sorted(unknown)}"))
    system = prompt.get("system", "")
    if not isinstance(system, str) or len(system) > MAX_SYSTEM_PROMPT:
        text = f"must have as `system` a text of at most {MAX_SYSTEM_PROMPT} characters"
        problems.append(_invalid("prompt", text))
    return problems + _check_examples(prompt.get("examples", []))


def _check_examples(examples: object) -> list[Problem]:
    """Demand [what a user says, what is answered] pairs of texts, and not too much of them."""
    pairs = cast("list[object]", examples) if isinstance(examples, list) else [None]
    for number, pair in enumerate(pairs, start=1):
        if not _is_pair(pair):
            text = f"`examples`, number {number}: must be a list of two texts that are not empty"
            return [_invalid("prompt", text)]
    length = sum(len(text) for pair in cast("list[list[str]]", pairs) for text in pair)
    if len(pairs) > MAX_EXAMPLES or length > MAX_EXAMPLE_TEXT:
        text = (
            f"has {len(pairs)} examples of {length} characters together; at most {MAX_EXAMPLES} "
            f"and {MAX_EXAMPLE_TEXT} are taken"
        )
        return [_invalid("prompt", text)]
    return []


def _is_pair(value: object) -> bool:
    if not isinstance(value, list):
        return False
    texts = cast("list[object]", value)
    return len(texts) == 2 and all(isinstance(text, str) and text.strip() for text in texts)


def _check_gate(card: dict[str, Any]) -> list[Problem]:
    """Demand `passed` and `failures` to agree: promotion reads them."""
    if "gate" not in card:
        return []
    gate = cast("dict[str, Any]", card["gate"])
    passed: object = gate.get("passed")
    failures: object = gate.get("failures", [])
    texts = isinstance(failures, list) and all(
        isinstance(text, str) for text in cast("list[object]", failures)
    )
    if not isinstance(passed, bool) or not texts or passed == (failures != []):
        text = "needs `passed` (true or false) and, exactly when false, sentences in `failures`"
        return [_invalid("gate", text)]
    return []


def _invalid(key: str, text: str) -> Problem:
    return ("card_invalid", f"{CARD_NAME}: `{key}` {text}.")


def _article(kind: type) -> str:
    return "an object" if kind is dict else "a text"


def _known() -> str:
    return ", ".join(FIELDS)
