"""Draw one sentence, and the slots it fills, from a template of the package hassil.

hassil's own sampler lists every expansion, which is millions for one of these templates, and
forgets which value each list gave. This walks the parsed template once, choosing as it goes.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hassil.expression import (
    Alternative,
    Expression,
    ListReference,
    Permutation,
    RuleReference,
    Sentence,
    Sequence,
    TextChunk,
)
from hassil.intents import RangeSlotList, SlotList, TextSlotList
from hassil.util import normalize_whitespace


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the references inside a template stand for."""

    rules: Mapping[str, Sentence]
    lists: Mapping[str, SlotList]


@dataclass(slots=True)
class Walk:
    """One pass through a template. `slots` fills up as lists are met."""

    grammar: Grammar
    rng: random.Random
    slots: dict[str, Any] = field(default_factory=dict[str, Any])

    def sentence(self, template: Sentence) -> str:
        """Return the text; the values it names are in `slots` afterwards."""
        return normalize_whitespace(self._text(template.expression)).strip()

    def _text(self, expression: Expression) -> str:
        match expression:
            case TextChunk():
                return expression.original_text
            case RuleReference():
                return self._text(self.grammar.rules[expression.rule_name].expression)
            case ListReference():
                return self._value(expression)
            case Alternative():
                return self._text(self.rng.choice(expression.items))
            case Permutation():
                items = self.rng.sample(expression.items, len(expression.items))
                return " ".join(self._text(item) for item in items)
            case Sequence():
                return "".join(self._text(item) for item in expression.items)
            case _:
                raise TypeError(f"hassil gave a {type(expression).__name__}, unknown here")

    def _value(self, reference: ListReference) -> str:
        values = self.grammar.lists[reference.list_name]
        match values:
            case TextSlotList():
                chosen = self.rng.choice(values.values)
                self.slots[reference.slot_name] = chosen.value_out
                return self._text(chosen.text_in)
            case RangeSlotList():
                number = self.rng.choice(list(values.get_numbers()))
                signed = number * (values.multiplier or 1)
                whole = float(signed).is_integer()
                self.slots[reference.slot_name] = int(signed) if whole else signed
                return str(number)
            case _:
                raise TypeError(f"the list {reference.list_name!r} holds a {type(values).__name__}")
