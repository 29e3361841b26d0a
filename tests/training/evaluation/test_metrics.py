import pytest

from training.evaluation.metrics import Verdict, judge, score

WANTED = '{"intent":"TurnOn","slots":{"area":"kitchen","level":1}}'


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
        ("null", False),
        ("", False),
    ],
)
def test_json_is_compared_as_values_with_their_types(answer: str, correct: bool) -> None:
    assert judge("json")(answer, WANTED).correct is correct


def test_intent_and_slots_are_counted_apart() -> None:
    facts = judge("json")('{"intent":"TurnOn","slots":{"area":"hall","level":1}}', WANTED).facts
    assert facts == {
        "valid": True,
        "intent": True,
        "slots_right": 1,
        "slots_said": 2,
        "slots_true": 2,
    }


def test_slot_f1_is_over_all_slots_of_all_answers() -> None:
    verdicts = [judge("json")(WANTED, WANTED), judge("json")("nonsense", WANTED)]
    found = score(verdicts)
    # 2 right of 2 said of 4 true: precision 1, recall 1/2.
    assert found.details["slot_f1"] == pytest.approx(2 / 3)
    assert found.details["valid_json"] == 0.5
    assert (found.correct, found.total, found.share.value) == (1, 2, 0.5)


def test_a_label_may_differ_in_case_and_spacing_and_nothing_else() -> None:
    label = judge("label")
    assert label(" diseases of  the Ear.", "Diseases of the ear").correct
    assert not label("Diseases of the eye", "Diseases of the ear").correct
    assert not label("Diseases of the ear and eye", "Diseases of the ear").correct


def test_exact_forgives_only_space_around() -> None:
    exact = judge("exact")
    assert exact(" ls -l\n", "ls -l").correct
    assert not exact("LS -l", "ls -l").correct


def test_a_score_without_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="no share"):
        score(list[Verdict]())
