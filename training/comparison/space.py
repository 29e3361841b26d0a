"""What a sweep tries: keys of a recipe with values or a range, and the orders to try them in."""

import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from math import exp, log
from typing import Any, Literal, Protocol

from training.errors import RecipeError
from training.recipe import Recipe, apply_overrides

Search = Literal["grid", "random", "optuna"]

# Data and task decide what the validation metric means: trials with other ones do not compare.
FREE = ("method.", "train.", "replay.", "seed")
MANY_TRIALS = 200  # more than that is a slip of the keyboard


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values, as they were written."""

    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """A number between two, ends included; on a log scale where they are 10 times apart or more."""

    low: float
    high: float
    whole: bool

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high >= 10 * self.low

    def write(self, value: float) -> str:
        return str(round(value)) if self.whole else f"{value:.6g}"


Space = dict[str, Choice | Range]
Trial = tuple[str, ...]  # overrides, in the order of the space's keys


class Chooser(Protocol):
    """Says what to try next, and hears how good it was (None: it was not run)."""

    def ask(self) -> Trial | None: ...
    def tell(self, trial: Trial, value: float | None) -> None: ...


def parse_space(recipe: Recipe, settings: Sequence[str]) -> tuple[Recipe, Space]:
    """Split `key=value` settings: single values change the recipe, `a,b` and `low..high` are tried.

    Every value is checked against the recipe's rules here, before anything is trained.
    Raises RecipeError.
    """
    fixed: list[str] = []
    space: Space = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        values = _split(text)
        if not equals or not key or "" in values:
            raise RecipeError(f"{setting!r} sets nothing: write key=a,b or key=low..high.")
        if ".." in text:
            space[key] = _range(setting, text)
        elif len(values) > 1:
            space[key] = Choice(tuple(values))
        else:
            fixed.append(setting)
    if not space:
        raise RecipeError("A sweep needs a key with several values: --set train.learning_rate=a,b.")
    recipe = apply_overrides(recipe, fixed)
    for key, tried in space.items():
        _check(recipe, key, tried)
    return recipe, space


def chooser(space: Space, search: Search, trials: int | None, seed: int) -> Chooser:
    """Return what chooses the trials; the same arguments and values told give the same trials."""
    if search == "optuna":
        return _Optuna(space, trials or 20, seed)
    if search == "random":
        return _Listed(islice(_drawn(space, seed), trials or 20))
    if ranges := [key for key, tried in space.items() if isinstance(tried, Range)]:
        raise RecipeError(f"A grid needs values, and {ranges[0]} has a range: --search random.")
    return _Listed(islice(_grid(space), trials))


def count_trials(space: Space, search: Search, trials: int | None) -> int:
    """Return how many trials there will be. Raises RecipeError where they are far too many."""
    count = trials or 20
    if all(isinstance(tried, Choice) for tried in space.values()) and search != "optuna":
        every = len(list(_grid(space)))
        count = min(every, trials or (every if search == "grid" else 20))
    if count > MANY_TRIALS:
        raise RecipeError(f"{count} trials are too many: give fewer values, or --trials.")
    return count


class _Listed:
    def __init__(self, trials: Iterator[Trial]) -> None:
        self._trials = trials

    def ask(self) -> Trial | None:
        return next(self._trials, None)

    def tell(self, trial: Trial, value: float | None) -> None:
        """A list does not learn."""


class _Optuna:
    """Tree-structured Parzen estimator (J. Bergstra et al., 2011), as optuna has it, seeded."""

    def __init__(self, space: Space, trials: int, seed: int) -> None:
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise RecipeError(
                "--search optuna needs the package optuna: pip install 'wardrobe[sweep]'."
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed)
        )
        self._failed = optuna.trial.TrialState.FAIL
        self._space, self._left = space, trials
        self._asked: dict[Trial, Any] = {}

    def ask(self) -> Trial | None:
        if not self._left:
            return None
        self._left -= 1
        asked = self._study.ask()
        trial = tuple(f"{key}={_suggest(asked, key, t)}" for key, t in self._space.items())
        self._asked[trial] = asked
        return trial

    def tell(self, trial: Trial, value: float | None) -> None:
        state = self._failed if value is None else None
        self._study.tell(self._asked[trial], value, state=state)


def _suggest(asked: Any, key: str, tried: Choice | Range) -> str:
    if isinstance(tried, Choice):
        return asked.suggest_categorical(key, tried.values)
    if tried.whole:
        return str(asked.suggest_int(key, round(tried.low), round(tried.high), log=tried.log))
    return tried.write(asked.suggest_float(key, tried.low, tried.high, log=tried.log))


def _grid(space: Space) -> Iterator[Trial]:
    values = [tried.values for tried in space.values() if isinstance(tried, Choice)]
    for chosen in product(*values):
        yield tuple(f"{key}={value}" for key, value in zip(space, chosen, strict=True))


def _drawn(space: Space, seed: int) -> Iterator[Trial]:
    """Draw trials that differ; end when a finite space has no new one."""
    generator = random.Random(seed)  # noqa: S311  # a search, not a secret
    if all(isinstance(tried, Choice) for tried in space.values()):
        trials = list(_grid(space))
        generator.shuffle(trials)
        yield from trials
        return
    while True:
        yield tuple(f"{key}={_draw(tried, generator)}" for key, tried in space.items())


def _draw(tried: Choice | Range, generator: random.Random) -> str:
    if isinstance(tried, Choice):
        return generator.choice(tried.values)
    if tried.log:
        return tried.write(exp(generator.uniform(log(tried.low), log(tried.high))))
    return tried.write(generator.uniform(tried.low, tried.high))


def _check(recipe: Recipe, key: str, tried: Choice | Range) -> None:
    if not key.startswith(FREE):
        raise RecipeError(
            f"{key} cannot be swept: trials with other data or another task do not compare. Swept "
            "can be method.*, train.*, replay.* and seed."
        )
    ends = tried.values if isinstance(tried, Choice) else map(tried.write, (tried.low, tried.high))
    for value in ends:
        apply_overrides(recipe, [f"{key}={value}"])


def _range(setting: str, text: str) -> Range:
    try:
        low, high = (tomllib.loads(f"v = {end.strip()}")["v"] for end in text.split(".."))
        if not low < high:
            raise ValueError
    except (ValueError, TypeError):
        raise RecipeError(f"{setting!r} is no range: write low..high, as in 1e-4..1e-2.") from None
    return Range(low, high, isinstance(low, int) and isinstance(high, int))


def _split(text: str) -> list[str]:
    """Split at commas that are not inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "\"'":
            quote = "" if letter == quote else quote or letter
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
