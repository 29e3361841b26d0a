"""The grammar of a call as Python writes it, held to the schema of its tool.

Every value is JSON, which is read back as what it is; arguments come in the order of the schema.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from serving.argument_schemas import argument, held, refuse, split
from serving.call_python import MAX_KEY
from serving.parameters import Schema

_MAX_OPTIONAL = 200  # arguments of a tool: llguidance looks at all that may come next at once
# A quote in an expression is written in another way: it begins no text of the grammar.
_PART = r"[^\s=,()\[\]{}\x22'#]"
_NAMES = re.compile(rf"(?=.{{1,{MAX_KEY}}}\Z){_PART}+( {_PART}+)*")

# Rules that all calls share: arguments that no schema names.
PYTHON_RULES = (
    'pair: KEY "=" any',
    f"KEY: /{_PART}( ?{_PART}){{0,{MAX_KEY // 2 - 1}}}/",
    f"any: %json {json.dumps(held({}, {}, ''))}",
)


def python_rules(rule: str, name: str, schema: Schema) -> Iterator[str]:
    """Yield the rule of a call of this tool, and those that it is made of.

    Raises GrammarRefused for what cannot be held.
    """
    properties, needed, more = split(schema, name, _NAMES)
    if len(properties.keys() - needed) > _MAX_OPTIONAL:
        refuse(f"{name!r} has more than {_MAX_OPTIONAL} parameters that may be left out")
    pairs = [
        f"{json.dumps(f'{key}=')} %json {_value(own, schema, argument(key, name))}"
        for key, own in properties.items()
    ]
    first = next((n for n, key in enumerate(properties) if key in needed), len(pairs))
    # Behind an argument that has to be there each one brings its comma.
    rest = " ".join(
        f'(", " {pair}){"?" * (key not in needed)}'
        for pair, key in [*zip(pairs, properties, strict=True)][first + 1 :]
    )
    always = f"{pairs[first]} {rest}" if first < len(pairs) else '""'
    if more:
        always = '(pair (", " pair)*)?'
    yield f'{rule}: {json.dumps(f"{name}(")} {rule}_0 ")"'
    for number, pair in enumerate(pairs[:first]):
        # Whether one came before decides about the comma: with it, and without.
        yield f"{rule}_{number}: {rule}_p{number} {rule}_c{number + 1} | {rule}_{number + 1}"
        yield f"{rule}_p{number}: {pair}"
        yield f'{rule}_c{number}: (", " {rule}_p{number})? {rule}_c{number + 1}'
    yield f"{rule}_{first}: {always}"
    yield f"{rule}_c{first}: " + (f'", " {rule}_{first}' if first < len(pairs) else '""')


def _value(own: Any, root: Schema, what: str) -> str:
    schema = {} if own is True else own
    if not isinstance(schema, dict):
        refuse(f"{what} has a schema that is none")
    return json.dumps(held(schema, root, what))
