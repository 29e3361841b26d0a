import pytest

from training.data.duplicates import NEAR, similarity
from training.data.examples import Example, Turn, ask
from training.errors import DataError, RecipeError
from training.fewshot.hint import derive_hint, hint_of
from training.fewshot.shots import Neighbours, class_of, shots_of, usable
from training.recipe import FewShot

NAMES = ("ox", "cat", "hen")
ANIMALS = [ask(f"{name} number {n}", name, f"{name}{n}") for n in range(5) for name in NAMES]
HOME = [
    ask("lamp on", '{"intent":"On","slots":{"name":"lamp"}}', "1"),
    ask("kitchen on", '{"slots":{"area":"kitchen","floor":{"level":1}},"intent":"On"}', "2"),
    ask("volume 3", '{"intent":"Volume","slots":{"level":3},"urgent":true}', "3"),
    ask("stop", '{"intent":"Stop"}', "4"),
    *(ask(f"stop {n}", '{"intent":"Stop"}', str(n)) for n in range(5, 9)),
]


def test_fixed_shots_are_the_first_examples() -> None:
    shots = shots_of(ANIMALS, 2, FewShot(choose="fixed"), "any")
    assert shots == (("ox number 0", "ox"), ("cat number 0", "cat"))


@pytest.mark.parametrize("choose", ["random", "class-covering"])
def test_drawn_shots_depend_on_the_seed_only_and_fewer_are_the_first_of_more(choose: str) -> None:
    settings = FewShot(choose=choose)  # type: ignore[arg-type]  # one of the two drawn ways
    eight = shots_of(ANIMALS, 8, settings, "0:1")
    assert eight == shots_of(list(ANIMALS), 8, settings, "0:1")
    assert eight[:3] == shots_of(ANIMALS, 3, settings, "0:1")
    assert eight != shots_of(ANIMALS, 8, settings, "0:2")
    assert len(set(eight)) == 8


@pytest.mark.parametrize("draw", range(20))
def test_class_covering_shows_every_class_before_any_twice(draw: int) -> None:
    answers = [a for _, a in shots_of(ANIMALS, 6, FewShot(choose="class-covering"), f"0:{draw}")]
    assert sorted(answers[:3]) == sorted(answers[3:]) == ["cat", "hen", "ox"]


def test_random_shots_do_not_cover_the_classes_in_every_draw() -> None:
    """What class-covering is there for; this test fails when the two are the same."""
    drawn = [shots_of(ANIMALS, 3, FewShot(choose="random"), f"0:{draw}") for draw in range(20)]
    assert any(len({answer for _, answer in shots}) < 3 for shots in drawn)


def test_nearest_shots_are_the_most_alike_with_the_closest_last_and_no_near_duplicate() -> None:
    texts = ["open the door", "open the door!", "open the window", "close the door", "sing"]
    neighbours = Neighbours([ask(text, text.upper(), text) for text in texts])
    question = ask("open the door", "?", "q")
    assert similarity("open the door!", question.text) >= NEAR
    shown = [said for said, _ in neighbours.shots_for(question, 2)]
    assert shown == ["open the window", "close the door"]
    assert [said for said, _ in neighbours.shots_for(question, 3)] == ["sing", *shown]
    with pytest.raises(DataError, match="has 3 to show"):
        neighbours.shots_for(question, 4)


def test_more_shots_than_examples_is_an_error() -> None:
    with pytest.raises(DataError, match="asks for 16 examples, and the training side has 15"):
        shots_of(ANIMALS, 16, FewShot(), "0:0")


def test_a_conversation_is_no_shot() -> None:
    turns = (Turn("user", "hi"), Turn("assistant", "hello"), Turn("user", "bye"))
    assert usable([Example(turns, "bye", "g"), ANIMALS[0]]) == [ANIMALS[0]]


def test_the_class_of_json_is_its_top_level_texts() -> None:
    assert class_of(HOME[0]) == class_of(HOME[1]) != class_of(HOME[2])
    assert class_of(ANIMALS[0]) == "ox"
    assert class_of(ask("?", "[1, 2]", "g")) == "[1, 2]"


def test_labels_are_listed() -> None:
    assert derive_hint(ANIMALS) == "Answer with one of:\ncat\nhen\nox"


def test_json_is_listed_by_its_forms_with_the_values_left_open() -> None:
    assert derive_hint(HOME) == (
        "Answer with JSON of one of these forms:\n"
        '{"intent":"On","slots":{"name":"…","area":"…","floor":{"level":"…"}}}\n'
        '{"intent":"Stop"}\n'
        '{"intent":"Volume","slots":{"level":"…"},"urgent":"…"}'
    )


def test_answers_that_hardly_repeat_are_not_listed() -> None:
    free = [ask(f"q{n}", f"an answer of its own, {n}", str(n)) for n in range(9)]
    assert derive_hint(free) is None
    assert hint_of(FewShot(), free) is None
    with pytest.raises(RecipeError, match=r"fewshot\.text"):
        hint_of(FewShot(labels=True), free)
    assert hint_of(FewShot(labels=True, text="Say it."), free) == "Say it."
    assert hint_of(FewShot(labels=False, text="Say it."), free) is None
