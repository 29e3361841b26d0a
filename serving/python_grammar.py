"""The grammar of a call as Python writes it, held to the schema of its tool.

Every value is JSON, which is read back as what it is; arguments come in the order of the schema.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from serving.argument_schemas import argument, held, refuse, split
from serving.parameters import Schema

# A quote in an expression is written in another way: it begins no text of the grammar.
_NAME = r"[^\s=,()\[\]{}\x22']+"
_NAMES = re.compile(rf"{_NAME}( {_NAME})*")

# Rules that all calls share: arguments that no schema names.
PYTHON_RULES = (
    'pair: KEY "=" any',
    f"KEY: /{_NAME}/",
    f"any: %json {json.dumps(held({}, {}, ''))}",
)


def python_rules(rule: str, name: str, schema: Schema) -> Iterator[str]:
    """Yield the rule of a call of this tool, and those that it is made of.

    Raises GrammarRefused for what cannot be held.
    """
    properties, needed, more = split(schema, name, _NAMES)
    yield f'{rule}: {json.dumps(f"{name}(")} {rule}_first_0 ")"'
    for number, (key, own) in enumerate(properties.items()):
        one, other = f"{rule}_{number}", number + 1
        yield f"{one}: {json.dumps(f'{key}=')} {one}_value"
        yield f"{one}_value: %json {_value(own, schema, argument(key, name))}"
        # Which arguments may be left out decides where a comma comes before the next one.
        first, later = f"{one} {rule}_later_{other}", f'", " {one}'
        yield f"{rule}_first_{number}: {first}" + f" | {rule}_first_{other}" * (key not in needed)
        yield f"{rule}_later_{number}: ({later}){'?' * (key not in needed)} {rule}_later_{other}"
    count = len(properties)
    yield f"{rule}_first_{count}: " + ('(pair (", " pair)*)?' if more else '""')
    yield f'{rule}_later_{count}: ""'


def _value(own: Any, root: Schema, what: str) -> str:
    schema = {} if own is True else own
    if not isinstance(schema, dict):
        refuse(f"{what} has a schema that is none")
    return json.dumps(held(schema, root, what))
