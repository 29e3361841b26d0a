"""Forward passes against transformers and PEFT themselves; forgetting on tiny models."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from registry.base import BaseModel
from tests import tiny
from training.data.duplicates import NEAR, nearest
from training.data.examples import Data
from training.data.general import QUESTIONS
from training.errors import DataError
from training.evaluation.evaluate import Answer, Ask, Variant
from training.evaluation.forgetting import Forgetting, leak_rule, measure_forgetting
from training.evaluation.forward import Row, load_reader
from training.evaluation.general import General, Question, general_of, load_general
from training.evaluation.loss import held_out_loss
from training.model import Hardware
from training.prompt import Prompter, load_prompter
from training.recipe import Recipe, apply_overrides

HARDWARE = Hardware("cpu", "float32", 1)
GENERAL = General(
    ("The sea is calm.", "A door was open.", "Rain fell all night."),
    (Question("Capital of France?", ("Paris",)), Question("Two and two?", ("4", "four"))),
)


@pytest.fixture(scope="module")
def adapter(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_adapter(tmp_path_factory.mktemp("worn") / "adapter", tiny_base.path, seed=3)


@pytest.fixture(scope="module")
def prompter(tiny_base: BaseModel) -> Prompter:
    return load_prompter(tiny_base.path, "Say the colour.")


def loaded(base: BaseModel, adapter: Path | None) -> torch.nn.Module:
    with tiny.peft_on_new_transformers():
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


@pytest.mark.parametrize("wears", [False, True])
def test_the_held_out_loss_is_that_of_transformers_and_peft(
    wears: bool, tiny_base: BaseModel, adapter: Path, prompter: Prompter, data: Data
) -> None:
    variant = Variant("it", tiny_base, "Say the colour.", adapter if wears else None)
    told: list[int] = []
    found = held_out_loss(
        variant, data.held_out, prompter, HARDWARE, progress=lambda p: told.append(p.done)
    )
    model = loaded(tiny_base, adapter if wears else None)
    sums, tokens = 0.0, 0
    for example in data.held_out:
        prompt, completion = prompter.encode(example)
        labels = torch.tensor([[-100] * len(prompt) + list(completion)])
        with torch.inference_mode():
            loss = model(input_ids=torch.tensor([[*prompt, *completion]]), labels=labels).loss
        sums += float(loss) * len(completion)
        tokens += len(completion)
    assert found.value == pytest.approx(sums / tokens, abs=1e-5)
    assert found.tokens == tokens
    assert found.low <= found.value <= found.high
    assert told == [2], "both at once"


def test_rows_read_together_lose_what_each_loses_alone(tiny_base: BaseModel, adapter: Path) -> None:
    rows = [Row(tuple(range(5, 5 + length)), 1 + length // 3) for length in (40, 3, 17, 2)]
    with load_reader(tiny_base, adapter, HARDWARE) as reader:
        alone = [reader.losses([row])[0] for row in rows]
        assert reader.losses(rows) == pytest.approx(alone, rel=1e-5)
        assert reader.losses(rows[1:2]) == pytest.approx(alone[1:2], rel=1e-5)


def test_an_adapter_taken_off_for_a_row_leaves_the_base(
    tiny_base: BaseModel, adapter: Path
) -> None:
    row = Row((1, 2, 3, 4), 2)
    with load_reader(tiny_base, None, HARDWARE) as plain:
        (of_base,) = plain.log_probs([row])
    with load_reader(tiny_base, adapter, HARDWARE) as worn:
        (off,), (on,) = worn.log_probs([row], off=True), worn.log_probs([row])
        assert torch.equal(off, of_base)
        assert not torch.allclose(on, of_base, atol=1e-3)
    assert of_base.shape == (2, tiny.VOCAB)
    assert torch.allclose(of_base.exp().sum(-1), torch.ones(2))


def says(prompter: Prompter, words: dict[Path | None, Sequence[str]]) -> Answer:
    def answer(
        model: BaseModel, asks: Sequence[Ask], limit: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        said = {worn: iter(answers) for worn, answers in words.items()}
        done(len(asks))
        return [list(prompter.completion_ids(next(said[worn]))) for _, worn in asks]

    return answer


def measure(
    recipe: Recipe, base: BaseModel, variants: list[Variant], prompter: Prompter, answer: Answer
) -> list[Forgetting]:
    return measure_forgetting(
        recipe.task,
        ["green", "blue"],
        base,
        variants,
        prompter,
        answer,
        GENERAL,
        HARDWARE,
        progress=lambda _: None,
    )


def test_an_adapter_is_asked_and_read_beside_its_base(
    recipe: Recipe, tiny_base: BaseModel, adapter: Path, prompter: Prompter
) -> None:
    speaker = says(prompter, {None: ["It is Paris.", "4"], adapter: ["Green.", "It is four"]})
    asked: list[Ask] = []

    def answer(
        model: BaseModel, asks: Sequence[Ask], limit: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        asked.extend(asks)
        return speaker(model, asks, limit, done)

    variant = Variant("mine", tiny_base, "Say the colour.", adapter, (("x", "y"),))
    base, mine = measure(recipe, tiny_base, [variant], prompter, answer)
    assert asked[0][0] == asked[2][0], "the adapter is asked under the default prompt"
    assert (base.name, base.answered.value, base.leaked.value) == ("base", 1.0, 0.0)
    assert (mine.name, mine.answered.value, mine.leaked.value) == ("mine", 0.5, 0.5)
    assert mine.answered_change.value == -0.5
    assert mine.leaked_change.value == 0.5
    assert (base.off_is_base, mine.off_is_base) == (None, True)
    assert base.kl.value == base.text_change.value == 0.0
    assert mine.text_change.value == pytest.approx(mine.text_loss.value - base.text_loss.value)
    assert base.perplexity == math.exp(base.text_loss.value)
    assert mine.kl.value == pytest.approx(
        kl_by_torch(tiny_base, adapter, prompter, asked[0][0], asked[1][0]), rel=1e-4
    )


def kl_by_torch(
    base: BaseModel, adapter: Path, prompter: Prompter, *prompts: tuple[int, ...]
) -> float:
    """KL of torch, over the base's two answers as they were said."""
    plain, worn = loaded(base, None), loaded(base, adapter)
    nats, tokens = 0.0, 0
    for prompt, text in zip(prompts, ("It is Paris.", "4"), strict=True):
        said = prompter.completion_ids(text)
        ids = torch.tensor([[*prompt, *said]])
        with torch.inference_mode():
            here = slice(len(prompt) - 1, -1)
            p, q = (m(input_ids=ids).logits[0, here].log_softmax(-1) for m in (plain, worn))
        nats += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
        tokens += len(said)
    return nats / tokens


def test_an_adapter_that_changes_the_frozen_base_is_caught(
    recipe: Recipe, tiny_base: BaseModel, prompter: Prompter, tmp_path: Path
) -> None:
    """PEFT's own PiSSA files take the base's weights apart when they are loaded."""
    with tiny.peft_on_new_transformers():
        model = AutoModelForCausalLM.from_pretrained(tiny_base.path, dtype=torch.float32)
        config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"])
        get_peft_model(model, config).save_pretrained(str(tmp_path))
    answer = says(prompter, {None: ["Paris", "4"], tmp_path: ["Paris", "4"]})
    variant = Variant("raw", tiny_base, "", tmp_path)
    assert measure(recipe, tiny_base, [variant], prompter, answer)[1].off_is_base is False


def test_a_full_fine_tune_and_a_prompt_are_variants_too(
    recipe: Recipe, tiny_base: BaseModel, prompter: Prompter, tmp_path: Path
) -> None:
    full = replace(tiny_base, path=tiny.make_base(tmp_path / "full", seed=9), fingerprint="f" * 64)
    variants = [
        Variant("full", full, "Say the colour."),
        Variant("prompt", tiny_base, "Say the colour.", None, (("sky", "blue"),)),
    ]
    asked: list[Ask] = []

    def answer(
        model: BaseModel, asks: Sequence[Ask], limit: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        asked.extend(asks)
        return [list(prompter.completion_ids("Paris")) for _ in asks]

    base, whole, prompt = measure(recipe, tiny_base, variants, prompter, answer)
    assert whole.off_is_base is None
    assert whole.kl.value > 0
    assert whole.text_loss.value != base.text_loss.value
    assert prompt.text_loss == base.text_loss, "the text is read without the prompt"
    assert prompt.kl.value > 0, "the answers are read after it"
    texts = [prompter.tokenizer.decode(list(ids)) for ids, _ in asked]
    assert sum("sky" in text for text in texts) == 2
    assert sum("Say the colour." in text for text in texts) == 2


def test_the_format_leaks_where_a_general_answer_looks_like_the_task(recipe: Recipe) -> None:
    def leaks(metric: str, answer: str) -> bool:
        task = replace(recipe.task, metric=metric)  # type: ignore[arg-type]  # one of the names
        return leak_rule(task, ["Diseases of the ear", "turn on the kitchen light"])(answer)

    assert leaks("json", ' {"intent": "TurnOn", "slo')
    assert not leaks("json", "Paris {France}")
    assert leaks("label", "diseases of the ear.")
    assert not leaks("label", "Your ear has diseases")
    assert leaks("rouge-l", "turn on the kitchen lights")
    assert not leaks("rouge-l", "The capital is Paris")


def test_an_answer_is_right_when_it_holds_one_as_whole_words() -> None:
    question = Question("?", ("Rome", "H2O"))
    assert question.answered_by("It is ROME, of course.")
    assert question.answered_by("h2o")
    assert not question.answered_by("Romeo")


def test_the_built_in_questions_and_texts_are_read() -> None:
    general = load_general()
    assert len(general.questions) >= 40
    assert len(general.texts) >= 30
    assert len({question.question for question in general.questions}) == len(general.questions)


def test_what_self_replay_teaches_is_not_what_forgetting_asks() -> None:
    asked = [question.question for question in load_general().questions]
    assert max(nearest(asked, QUESTIONS)) < NEAR


def test_a_recipe_names_texts_and_questions_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one line\nanother line\n")
    chosen = apply_overrides(recipe, [f"task.general_text={tmp_path / 'texts.txt'}"])
    general = general_of(chosen)
    assert general.texts == ("one line", "another line")
    assert general.questions == load_general().questions


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"question": "a?", "answers": ["b"]}\n', "at least two"),
        ('\n{"question": "a?"}\n', ":2 is no question"),
        ("not json\n", ":1 is no question"),
        ('{"question": "a?", "answers": []}\n', "at least one answer"),
        ('{"question": "a?", "answers": [" "]}\n', "at least one answer"),
    ],
)
def test_a_wrong_line_of_questions_is_named(lines: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=said):
        load_general(None, path)


def test_a_text_file_must_be_there_be_text_and_have_lines(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    with pytest.raises(DataError, match="no file"):
        load_general(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match="not UTF-8"):
        load_general(path)
    path.write_text("only one\n\n")
    with pytest.raises(DataError, match="at least two lines"):
        load_general(path)


def test_half_of_what_is_general_is_every_second_and_never_too_few() -> None:
    whole = load_general()
    assert whole.half().texts == whole.texts[::2]
    assert len(whole.half().questions) == 21
    few = General(whole.texts[:2], whole.questions[:3])
    assert few.half() == General(whole.texts[:2], (whole.questions[0], whole.questions[2]))
