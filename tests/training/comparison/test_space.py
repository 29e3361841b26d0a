import pytest

from training.comparison.space import Choice, Range, Search, chooser, count_trials, parse_space
from training.errors import RecipeError
from training.recipe import Recipe


def trials_of(space, search: Search, trials: int | None = None, seed: int = 0) -> list[tuple]:
    """Every trial, told a value that a larger learning rate raises."""
    choose = chooser(space, search, trials, seed)
    found = []
    while (trial := choose.ask()) is not None:
        found.append(trial)
        choose.tell(trial, float(trial[0].partition("=")[2]))
    return found


def test_several_values_are_tried_and_a_single_one_is_set(recipe: Recipe) -> None:
    changed, space = parse_space(
        recipe, ["train.learning_rate=1e-4, 5e-4", "train.steps=3", "method.r=2..16"]
    )
    assert changed.train.steps == 3
    assert space == {
        "train.learning_rate": Choice(("1e-4", "5e-4")),
        "method.r": Range(2, 16, whole=True),
    }


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (["train.steps=3"], "several values"),
        (["train.learning_rate=1e-4,"], "sets nothing"),
        (["train.learning_rate=1e-2..1e-4"], "no range"),
        (["train.learning_rate=1e-4,fast"], "learning_rate"),
        (["train.learning_rat=1e-4,1e-3"], "no key of a recipe"),
        (["data.train_limit=10,20"], "cannot be swept"),
        (["task.metric=exact,label"], "cannot be swept"),
    ],
)
def test_what_cannot_be_tried_is_said_before_anything_is_trained(
    recipe: Recipe, settings: list[str], word: str
) -> None:
    with pytest.raises(RecipeError, match=word):
        parse_space(recipe, settings)


def test_a_grid_is_every_combination(recipe: Recipe) -> None:
    _, space = parse_space(recipe, ["train.learning_rate=1e-4,5e-4", "method.r=4,8,16"])
    trials = trials_of(space, "grid")
    assert len(set(trials)) == 6 == count_trials(space, "grid", None)
    assert trials[0] == ("train.learning_rate=1e-4", "method.r=4")


def test_a_grid_has_no_ranges(recipe: Recipe) -> None:
    _, space = parse_space(recipe, ["train.learning_rate=1e-4..1e-2"])
    with pytest.raises(RecipeError, match="--search random"):
        chooser(space, "grid", None, 0)


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_search_draws_within_its_range_and_the_same_again(recipe: Recipe, search) -> None:
    _, space = parse_space(recipe, ["train.learning_rate=1e-5..1e-1", "method.r=2..16"])
    trials = trials_of(space, search, 12)
    assert trials == trials_of(space, search, 12)
    assert trials != trials_of(space, search, 12, seed=1)
    rates = [float(trial[0].partition("=")[2]) for trial in trials]
    ranks = [int(trial[1].partition("=")[2]) for trial in trials]
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert all(2 <= rank <= 16 for rank in ranks)
    assert sum(rate < 1e-3 for rate in rates) >= 2  # on a log scale half of the range is below


def test_a_random_search_of_few_values_tries_none_twice(recipe: Recipe) -> None:
    _, space = parse_space(recipe, ["method.r=4,8,16"])
    assert sorted(trials_of(space, "random", 20)) == [
        ("method.r=16",),
        ("method.r=4",),
        ("method.r=8",),
    ]
    assert count_trials(space, "random", 20) == 3


def test_optuna_learns_from_what_it_is_told(recipe: Recipe) -> None:
    """Told that a larger rate is better, its later trials are larger than a random search's."""
    _, space = parse_space(recipe, ["train.learning_rate=1e-5..1e-1"])

    def late(search: Search) -> float:
        rates = [float(trial[0].partition("=")[2]) for trial in trials_of(space, search, 30)]
        return sum(rates[15:]) / 15

    assert late("optuna") > 1.5 * late("random")


def test_a_value_with_commas_in_brackets_is_one(recipe: Recipe) -> None:
    _, space = parse_space(recipe, ['method.targets=["q_proj","v_proj"],all-linear'])
    assert space["method.targets"] == Choice(('["q_proj","v_proj"]', "all-linear"))
