"""The comparison in plain words. It names no winner that the data does not support.

What to ship is a rule, not a test: of the rows that are not told apart from the best one and lie
within `MARGIN` of it, the first by: hot-swaps, keeps general answers, fewest prompt tokens, fewest
bytes, best value. "Not told apart" alone would not do: with few items nearly nothing is.
"""

from collections.abc import Sequence

from training.comparison.result import Forgetting, Pair, Row, Verdict
from training.comparison.significance import Groups, interval
from training.evaluation import planning
from training.evaluation.statistics import LEVEL

MARGIN = 0.05  # of the metric: what a cheaper row may lie below the best one
FORGETS = 0.10  # below the base in general questions answered
SAME_TOKENS = 1.0  # a request


def decide(
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    groups: Groups,
    untouched: Forgetting | None = None,
) -> Verdict:
    """Decide winner, level rows and what to ship.

    The base prompt is the row of strategy prompt; `untouched` is what the base itself knows.
    """
    best = max(rows, key=lambda row: row.value)
    against = {pair.second: pair for pair in pairs if pair.first == best.name}
    against |= {pair.first: pair for pair in pairs if pair.second == best.name}
    level = [row for row in rows if row is best or against[row.name].p_holm >= LEVEL]
    winner = best.name if len(level) == 1 and len(rows) > 1 else None
    base = next(row for row in rows if row.strategy == "prompt")
    ship = None if base in level else _to_ship(level, best, untouched)
    findings = [
        *_told_apart(rows, level, best, against),
        *_not_told_apart(level, best, against),
        *_seeds(rows),
        *_shipping(ship, level, best, untouched),
    ]
    return Verdict(
        headline=_headline(winner, level, best, base, groups),
        findings=tuple(findings),
        best=best.name,
        winner=winner,
        level=tuple(row.name for row in level),
        ship=ship.name if ship else None,
    )


def forgets(row: Row, untouched: Forgetting | None) -> bool:
    """Tell whether a row answers clearly fewer general questions than the base itself."""
    if row.forgetting is None or untouched is None:
        return False
    return row.forgetting.qa_accuracy < untouched.qa_accuracy - FORGETS


def break_even(row: Row, other: Row, parameters: int) -> int | None:
    """Return after how many requests the training of `row` is paid by its shorter prompts.

    Both in FLOPs: a forward pass costs about 2N a token for N parameters. None: never.
    """
    each, each_other = (2 * parameters * side.cost.prompt_tokens for side in (row, other))
    return planning.break_even(row.cost.train_flops, each, each_other)


def _to_ship(level: Sequence[Row], best: Row, untouched: Forgetting | None) -> Row:
    near = [row for row in level if row.value >= best.value - MARGIN]
    return min(
        near,
        key=lambda row: (
            not row.hot_swaps,
            forgets(row, untouched),
            round(row.cost.prompt_tokens),
            row.cost.bytes,
            -row.value,
        ),
    )


def _headline(
    winner: str | None, level: Sequence[Row], best: Row, base: Row, groups: Groups
) -> str:
    share = f"{interval(best.runs, groups)}"
    if best is base:
        return f"Nothing here beats the base prompt, which has {share}."
    if base in level:
        return (
            f"Nothing here is told apart from the base prompt: the best seen is {best.name} with "
            f"{share}, the base prompt has {interval(base.runs, groups)}."
        )
    if winner:
        return f"{winner} is the best of this table: {share}, told apart from every other row."
    others = _listed([row.name for row in level if row is not best])
    return (
        f"No single winner. {best.name} is highest with {share}; not told apart from it: {others}."
    )


def _told_apart(
    rows: Sequence[Row], level: Sequence[Row], best: Row, against: dict[str, Pair]
) -> list[str]:
    worse = [row for row in rows if row not in level]
    if not worse:
        return []
    said = [
        f"{row.name} by {_points(abs(against[row.name].difference))} ({p_value(against[row.name])})"
        for row in sorted(worse, key=lambda row: -row.value)
    ]
    return [f"{best.name} is better than {_listed(said)}."]


def _not_told_apart(level: Sequence[Row], best: Row, against: dict[str, Pair]) -> list[str]:
    said = [
        f"{row.name} ({_percent(row.value)}, {p_value(pair)}, {_needed(pair)})"
        for row in sorted(level, key=lambda row: -row.value)
        if (pair := against.get(row.name))
    ]
    if not said:
        return []
    power = "Items needed are those that show the difference seen with 80 % power, were it real."
    return [f"Not told apart from {best.name} ({_percent(best.value)}): {'; '.join(said)}. {power}"]


def _needed(pair: Pair) -> str:
    if pair.difference == 0:
        return "equal here"
    if pair.items_needed is None:
        return "seeds differ more than the two do: more seeds needed, not more items"
    return f"about {pair.items_needed:,} items needed"


def _seeds(rows: Sequence[Row]) -> list[str]:
    trained = [row for row in rows if row.strategy not in ("prompt", "few-shot")]
    if any(len(row.runs) == 1 for row in trained):
        return [
            "Each method was trained with one seed, so this is about these very runs; another seed "
            "may move a row by some points. Three seeds or more would speak for the methods."
        ]
    return []


def _shipping(
    ship: Row | None, level: Sequence[Row], best: Row, untouched: Forgetting | None
) -> list[str]:
    if ship is None:
        return ["Ship nothing of this: more examples, more steps or a larger base come first."]
    if ship is best:
        reason = "it is the best seen"
        if len(level) > 1:
            reason += ", and no cheaper row that keeps as much comes within 5 points of it"
    else:
        near = f"within {_points(MARGIN)} of the best seen ({_percent(best.value)}, {best.name})"
        reason = (
            f"{_percent(ship.value)} is {near} and not told apart from it, and "
            f"{_cheaper(ship, best, untouched)}"
        )
    text = f"Ship {ship.name}: {reason}."
    if forgets(ship, untouched) and ship.forgetting and untouched:
        text += (
            f" Mind that with it on, {_percent(ship.forgetting.qa_accuracy)} of general questions "
            f"are answered right, against {_percent(untouched.qa_accuracy)} by the base; "
            "requests without the adapter keep the base's answers."
        )
    return [text]


def _cheaper(ship: Row, best: Row, untouched: Forgetting | None) -> str:
    if ship.hot_swaps and not best.hot_swaps:
        return "it hot-swaps over the frozen base, which the other cannot"
    keeps = forgets(best, untouched) and not forgets(ship, untouched)
    if keeps and ship.forgetting and best.forgetting:
        return (
            f"it keeps {_percent(ship.forgetting.qa_accuracy)} of general questions right, the "
            f"other {_percent(best.forgetting.qa_accuracy)}"
        )
    saved = best.cost.prompt_tokens - ship.cost.prompt_tokens
    if saved >= SAME_TOKENS:
        return f"a request needs {saved:.0f} fewer prompt tokens"
    return f"it takes {size(ship.cost.bytes)} instead of {size(best.cost.bytes)}"


def size(count: float) -> str:
    """Write bytes for people, in powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:.1f} points"


def p_value(pair: Pair) -> str:
    return "p < 0.001" if pair.p_holm < 0.001 else f"p = {pair.p_holm:.2g}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
