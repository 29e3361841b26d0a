from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.examples import ask
from training.errors import DataError, RecipeError
from training.evaluation import metrics
from training.evaluation.metrics import Verdict, leaves, longest_common, score
from training.recipe import Recipe, apply_overrides

WANTED = '{"intent":"TurnOn","slots":{"area":"kitchen","level":1}}'


def verdict(metric: str, answer: str, expected: str) -> Verdict:
    judges = {
        "exact": metrics.judge_exact,
        "label": metrics.judge_label,
        "json": metrics.judge_json,
        "rouge-l": metrics.judge_rouge_l,
        "chrf": metrics.chrf_judge(),
    }
    return judges[metric](ask("?", expected, "g"), answer)


def total(metric: str, pairs: list[tuple[str, str]]) -> metrics.Score:
    return score([verdict(metric, *pair) for pair in pairs], range(len(pairs)))


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        (WANTED, True),
        ('{"slots": {"level": 1, "area": "kitchen"}, "intent": "TurnOn"}', True),
        ('{"intent":"TurnOn","slots":{"area":"kitchen","level":true}}', False),
        ('{"intent":"TurnOn","slots":{"area":"kitchen","level":"1"}}', False),
        ('{"intent":"TurnOn","slots":{"area":"kitchen","level":1}} ok', False),
        ('{"intent":"TurnOff","slots":{"area":"kitchen","level":1}}', False),
        ("[" * 100_000, False),
        ("[" * 900 + "]" * 900, False),
        ("null", False),
        ("", False),
    ],
)
def test_json_is_compared_as_values_with_their_types(answer: str, correct: bool) -> None:
    assert verdict("json", answer, WANTED).correct is correct


def test_intent_slots_and_fields_are_counted_apart() -> None:
    facts = verdict("json", '{"intent":"TurnOn","slots":{"area":"hall","level":1}}', WANTED).facts
    assert facts == {
        "valid": True,
        "intent": True,
        "slots_right": 1,
        "slots_said": 2,
        "slots_true": 2,
        "fields_right": 2,
        "fields_said": 3,
        "fields_true": 3,
    }


def test_slot_f1_is_over_all_slots_of_all_answers() -> None:
    found = total("json", [(WANTED, WANTED), ("nonsense", WANTED)])
    # 2 right of 2 said of 4 true: precision 1, recall 1/2.
    assert found.details["slot_f1"].value == pytest.approx(2 / 3)
    assert found.details["field_f1"].value == pytest.approx(2 * 3 / 9)
    assert found.details["valid_json"].value == 0.5
    assert (found.correct, found.total, found.share.value) == (1, 2, 0.5)


def test_any_json_has_fields_and_only_intents_have_intents() -> None:
    expected = '{"person":{"name":"Ada","tags":["a","b"]},"done":[]}'
    found = total("json", [('{"person":{"name":"Ada","tags":["b"]},"done":[]}', expected)])
    # name and done are right; said 3, true 4.
    assert found.details["field_f1"].value == pytest.approx(2 * 2 / 7)
    assert sorted(found.details) == ["field_f1", "valid_json"]


def test_leaves_are_paths_with_values() -> None:
    value = {"a": [1, {"b": True}], "c": {}, "d": None}
    assert leaves(value) == {
        (".a[0]", "1"),
        (".a[1].b", "true"),
        (".c", "{}"),
        (".d", "null"),
    }


def test_an_expected_answer_that_is_no_json_is_an_error_of_the_data() -> None:
    with pytest.raises(DataError, match="is no JSON"):
        verdict("json", "{}", "{intent: TurnOn}")


def test_a_label_may_differ_in_case_and_spacing_and_nothing_else() -> None:
    assert verdict("label", " diseases of  the Ear.", "Diseases of the ear").correct
    assert not verdict("label", "Diseases of the eye", "Diseases of the ear").correct
    assert not verdict("label", "Diseases of the ear and eye", "Diseases of the ear").correct


def test_macro_f1_is_the_mean_over_the_expected_labels() -> None:
    said = ["a", "a", "b", "b", "nonsense", "c"]
    true = ["a", "a", "a", "b", "b", "b"]
    found = total("label", list(zip(said, true, strict=True)))
    # a: 2 hits of 2 said of 3 true, 4/5; b: 1 hit of 2 said of 3 true, 2/5; c is expected nowhere.
    assert found.details["macro_f1"].value == pytest.approx((4 / 5 + 2 / 5) / 2)
    assert found.share.value == 0.5


def test_exact_forgives_only_space_around() -> None:
    assert verdict("exact", " ls -l\n", "ls -l").correct
    assert not verdict("exact", "LS -l", "ls -l").correct


@pytest.mark.parametrize(
    ("answer", "expected", "golden"),
    # F-measure of rougeL of the package rouge-score 0.1.2, without stemmer.
    [
        ("the cat sat on the mat", "the cat is on the mat", 0.8333333333333334),
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("the gunman kill police", "police kill the gunman", 0.5),
        ("Run: `cargo build --release`", "cargo build --release", 0.8571428571428571),
        ("", "something", 0.0),
        ("a b c d e", "e d c b a", 0.2),
    ],
)
def test_rouge_l_equals_the_package_of_its_authors(
    answer: str, expected: str, golden: float
) -> None:
    assert verdict("rouge-l", answer, expected).value == pytest.approx(golden)


def test_rouge_l_reads_words_of_every_language() -> None:
    assert verdict("rouge-l", "Ёлка горит", "ёлка ГОРИТ").value == 1.0
    assert verdict("rouge-l", "…", "!").value == 1.0, "no words on both sides"


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abcd"), max_size=9))
def test_the_longest_common_subsequence_is_that_of_the_table(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            best = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else best
    assert longest_common(a, b) == table[-1][-1]


def test_chrf_is_a_share_and_equals_golden_values() -> None:
    assert verdict("chrf", "the cat", "the cat").value == pytest.approx(1.0)
    assert verdict("chrf", "xyz", "the cat").value == 0.0
    # Six orders of "ab" against "abc": precision 1, 1; recall 2/3, 1/2; β = 2, averaged first:
    # P = 1, R = 7/12, 5PR / (4P + R).
    assert verdict("chrf", "ab", "abc").value == pytest.approx(5 * 7 / 12 / (4 + 7 / 12), abs=1e-6)


def test_real_values_have_an_interval_of_their_own() -> None:
    pairs = [("a b c", "a b c"), ("a b", "a b c"), ("a", "a b c"), ("x", "a b c")]
    found = total("rouge-l", pairs)
    assert found.share.value == pytest.approx((1 + 0.8 + 0.5 + 0) / 4)
    assert 0 <= found.share.low < found.share.value < found.share.high <= 1
    assert found.correct == 1


FUNCTION = """
def passes(question, answer, expected):
    if answer == "raise":
        raise LookupError("no such row")
    if answer == "exit":
        raise SystemExit(3)
    if answer == "odd":
        return 1
    return question == "?" and answer == expected[::-1]
"""


def with_function(recipe: Recipe, folder: Path, place: str, source: str = FUNCTION) -> Recipe:
    (folder / "judge.py").write_text(source)
    settings = ["task.metric=function", f"task.function={folder / place}"]
    return apply_overrides(recipe, settings)


def test_a_function_of_the_recipe_decides_and_its_failures_are_named(
    recipe: Recipe, tmp_path: Path
) -> None:
    judge = metrics.judge(with_function(recipe, tmp_path, "judge.py:passes"))
    example = ask("?", "abc", "g")
    verdicts = {said: judge(example, said) for said in ("cba", "abc", "raise", "exit", "odd")}
    assert {said: v.value for said, v in verdicts.items() if v.value} == {"cba": 1.0}
    reasons = {said: v.facts["error"] for said, v in verdicts.items() if v.facts}
    assert reasons == {
        "raise": "LookupError: no such row",
        "exit": "SystemExit: 3",
        "odd": "It returned 1, not True or False.",
    }
    found = score(list(verdicts.values()), range(5))
    assert (found.correct, found.total, found.errors) == (1, 5, 3)


@pytest.mark.parametrize(
    ("place", "source", "said"),
    [
        ("other.py:passes", FUNCTION, "there is no file"),
        ("judge.py:missing", FUNCTION, "no function 'missing'"),
        ("judge.py:passes", "import nothing_like_it", "ModuleNotFoundError"),
        ("judge.py:passes", "passes = 3", "no function 'passes'"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_an_error_of_the_recipe(
    recipe: Recipe, tmp_path: Path, place: str, source: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        metrics.judge(with_function(recipe, tmp_path, place, source))


@pytest.mark.parametrize(
    "settings",
    [["task.metric=function"], ["task.function=judge.py:f"], ["task.function=judge.txt:f"]],
)
def test_a_function_and_its_metric_belong_together(recipe: Recipe, settings: list[Any]) -> None:
    with pytest.raises(RecipeError, match="function"):
        apply_overrides(recipe, settings)


def test_what_judges_is_part_of_the_recipe_by_its_content(recipe: Recipe, tmp_path: Path) -> None:
    chosen = with_function(recipe, tmp_path, "judge.py:passes")
    before = chosen.digest
    assert with_function(recipe, tmp_path, str(tmp_path / "judge.py:passes")).digest == before
    (tmp_path / "judge.py").write_text(FUNCTION + "\n")
    assert chosen.digest != before
    (tmp_path / "judge.py").unlink()
    with pytest.raises(RecipeError, match="there is no file"):
        assert chosen.digest


def test_a_score_without_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="no share"):
        score(list[Verdict](), [])
