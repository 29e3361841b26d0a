"""Whatever PEFT saves is either worn as PEFT computes it, in one mixed batch, or refused."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from safetensors.torch import load_file, save_file

from registry.adapter import AdapterName, AdapterRef
from registry.architectures import THROUGH_TRANSFORMERS
from registry.base import Bases
from registry.config import REFUSED_TYPES
from registry.errors import Refused
from registry.forms import FORMS
from registry.store import Registry
from registry.vectors import VECTOR_TYPES
from serving.engine.boundary import GenerateRequest
from serving.engine.build import assemble, read_model
from serving.engine.engine import TorchEngine
from serving.engine.model_runner import Forward
from serving.engine.ops.native.target import Target, runnable_targets
from serving.engine.settings import EngineSettings, OperatorsName
from tests import tiny
from tests.peft_cases import BASE_ID, CASES, END, START, Case, cases_of, make, table
from tests.serving.engine.builds import read_compiled
from tests.serving.engine.driving import Oracle, Result, request, run_all
from tests.serving.engine.test_bases_against_peft import ALSO, THROUGH

BOUND = 1e-4
LENGTH = 6
SETTINGS = EngineSettings(
    device="cpu", dtype="float32", max_model_len=128, adapter_slots=64, max_running=96
)
BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
WORN = [case for case in CASES if case.outcome != "refused"]
IN_BFLOAT16 = [  # the best target here, the others in the long run
    pytest.param(target, marks=[pytest.mark.long] if others else [], id=target.name)
    for others, target in enumerate(runnable_targets(torch.bfloat16))
]
OTHERS_IN_FLOAT32 = [
    pytest.param(target, marks=[pytest.mark.long] if others else [], id=target.name)
    for others, target in enumerate(runnable_targets(torch.float32)[1:])
]
REFUSED = [case for case in CASES if case.outcome == "refused"]
SAVED = [case for case in WORN if "modules_to_save" in case.title]
MATRICES = [case for case in SAVED if "embedding" in case.title or "head" in case.title]
TOKENS = [case for case in WORN if "token" in case.title or "tying" in case.title]
TIED = [case for case in WORN if "tying" in case.title]
UNTIED = [*SAVED, *(case for case in TOKENS if case not in SAVED)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def titled(case: Case) -> str:
    return case.title


class Wardrobe:
    """Adapters that can be worn, pushed through the gate, and where PEFT saved them."""

    def __init__(
        self, folder: Path, arch: str = "llama", cases: Sequence[Case] = WORN, **config: Any
    ) -> None:
        self.folder = folder
        self.bases = Bases(folder / "bases")
        made = tiny.make_base(folder / "made", seed=3, arch=arch, **config)
        self.base = tiny.register(made, self.bases, BASE_ID)
        self.registry = Registry.open(folder / "home", self.bases)
        self.saved: dict[str, Path] = {}
        self.refs: dict[str, AdapterRef] = {}
        for case in cases:
            self.saved[case.title] = make(case, self.base.path, folder / f"saved-{len(self.saved)}")
            self.refs[case.title] = self.push(self.saved[case.title])

    def push(self, saved: Path) -> AdapterRef:
        name = AdapterName("acme", f"a{len(self.refs)}")
        return self.registry.push(saved, name, base=BASE_ID, actor="test").version.ref


@pytest.fixture(scope="module")
def wardrobe(tmp_path_factory: pytest.TempPathFactory) -> Wardrobe:
    return Wardrobe(tmp_path_factory.mktemp("peft"), **BIASES)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Wardrobe:
    """A base with a head of its own, and what an adapter may do to it and to the embedding."""
    folder = tmp_path_factory.mktemp("untied")
    return Wardrobe(folder, cases=UNTIED, tie_word_embeddings=False, **BIASES)


def prompt_of(title: str) -> list[int]:
    rng = random.Random(title)
    return [rng.randrange(256) for _ in range(rng.randint(5, 30))]


FEW: dict[str, Any] = {"adapter_slots": 3, "max_running": 7, "max_batched_tokens": 17}
WAYS: dict[str, dict[str, Any]] = {
    "C++": {},
    "torch": {"operators": "torch"},
    "C++ few slots and chunks": FEW,
    "torch few slots and chunks": FEW | {"operators": "torch"},
}


@pytest.fixture(scope="module", params=WAYS)
def results(wardrobe: Wardrobe, request: pytest.FixtureRequest) -> dict[str, Result]:
    return in_a_way(wardrobe, request.param)


@pytest.fixture(scope="module", params=[way for way in WAYS if "few" in way])
def untied_results(untied: Wardrobe, request: pytest.FixtureRequest) -> dict[str, Result]:
    return in_a_way(untied, request.param)


def in_a_way(wardrobe: Wardrobe, way: str) -> dict[str, Result]:
    settings = replace(SETTINGS, **WAYS[way])
    return run_mixed(wardrobe, read_model(wardrobe.base, settings), settings)


def run_mixed(wardrobe: Wardrobe, model: Forward, settings: EngineSettings) -> dict[str, Result]:
    """Run one request for every adapter, and as many for the base, in one batch."""
    parts = assemble(model, wardrobe.registry.find_files, settings)
    titles = [*wardrobe.refs, *(f"base {title}" for title in wardrobe.refs)]
    random.Random(5).shuffle(titles)
    wanted = [ask(prompt_of(title), wardrobe.refs.get(title)) for title in titles]
    return dict(zip(titles, run_all(TorchEngine(parts, settings), wanted), strict=True))


def ask(prompt: list[int], ref: AdapterRef | None) -> GenerateRequest:
    return request(prompt, ref, max_tokens=LENGTH, logprobs=5)


@pytest.mark.parametrize("case", WORN, ids=titled)
def test_a_row_of_the_mixed_batch_is_what_peft_computes_alone(
    case: Case, wardrobe: Wardrobe, results: dict[str, Result]
) -> None:
    check(case.title, wardrobe, results[case.title])


@pytest.mark.parametrize("case", UNTIED, ids=titled)
def test_a_row_is_what_peft_computes_where_the_head_is_not_the_embedding(
    case: Case, untied: Wardrobe, untied_results: dict[str, Result]
) -> None:
    check(case.title, untied, untied_results[case.title])


def check(title: str, wardrobe: Wardrobe, result: Result) -> None:
    prompt, base = prompt_of(title), wardrobe.base.path
    oracle = Oracle(base, wardrobe.saved[title])
    assert len(result.tokens) == LENGTH
    assert result.tokens == oracle.likeliest(prompt, result.tokens), title
    assert oracle.largest_error(prompt, result) < BOUND, title
    # The control: an engine that wore nothing would not have passed.
    assert Oracle(base).largest_error(prompt, result) > 100 * BOUND, title


@pytest.mark.parametrize("target", OTHERS_IN_FLOAT32)
def test_all_of_it_is_what_peft_computes_with_other_instructions(
    wardrobe: Wardrobe, target: Target
) -> None:
    """The best ones have computed what is held to PEFT one by one."""
    settings = replace(SETTINGS, **FEW)
    model = read_compiled(wardrobe.base.path, target, torch.float32, 128)
    results = run_mixed(wardrobe, model, settings)
    for title in wardrobe.refs:
        check(title, wardrobe, results[title])


ON_TRITON = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
)


def triton_model(
    wardrobe: Wardrobe, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> Forward:
    pytest.importorskip("triton", reason="the package triton is not installed")
    from tests.serving.engine import kernels

    if device == "cpu" and (kernels.BROKEN or not kernels.INTERPRETED):
        pytest.skip("Triton does not interpret here")
    kernels.share_out_to_few(monkeypatch)
    return kernels.read_triton(wardrobe.base.path, torch.device(device), 128, dtype)


@pytest.mark.long
@pytest.mark.timeout(1800)  # the interpreter is slow
@ON_TRITON
@pytest.mark.parametrize("which", ["wardrobe", "untied"])
def test_all_of_it_is_what_peft_computes_with_the_triton_operators(
    which: str, device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    wardrobe = request.getfixturevalue(which)
    model = triton_model(wardrobe, device, torch.float32, monkeypatch)
    results = run_mixed(wardrobe, model, replace(SETTINGS, **FEW))
    for title in wardrobe.refs:
        check(title, wardrobe, results[title])


@pytest.mark.long
@pytest.mark.timeout(1800)  # the interpreter is slow
@ON_TRITON
def test_with_the_triton_operators_and_numbers_of_16_bits_it_is_near_to_peft(
    wardrobe: Wardrobe, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter has no bfloat16; float16 is nearer still."""
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    check_rounded(wardrobe, triton_model(wardrobe, device, dtype, monkeypatch))


@pytest.mark.parametrize("target", IN_BFLOAT16)
def test_in_bfloat16_all_of_it_is_as_near_to_peft_as_peft_itself(
    wardrobe: Wardrobe, target: Target
) -> None:
    check_rounded(wardrobe, read_compiled(wardrobe.base.path, target, torch.bfloat16, 128))


def check_rounded(wardrobe: Wardrobe, model: Forward) -> None:
    """PEFT in bfloat16 is some hundredths away from PEFT in float32."""
    base = wardrobe.base.path
    results = run_mixed(wardrobe, model, replace(SETTINGS, **FEW))
    for title, saved in wardrobe.saved.items():
        prompt, result = prompt_of(title), results[title]
        exact = Oracle(base, saved)
        bound = 2 * exact.distance(Oracle(base, saved, torch.bfloat16), prompt, result)
        assert exact.largest_error(prompt, result) < bound, title
        assert Oracle(base).largest_error(prompt, result) > 2 * bound, title


@pytest.mark.long
@pytest.mark.parametrize("operators", ["auto", "torch"])
@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("mistral", {"sliding_window": 24}),  # with what a prompt tunes still in sight
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32, "attention_bias": True}),
    ],
)
def test_the_rest_of_the_llama_family_wears_all_of_it_as_peft_does(
    tmp_path: Path, arch: str, config: dict[str, Any], operators: OperatorsName
) -> None:
    wardrobe = Wardrobe(tmp_path, arch, **config)
    check_all(wardrobe, replace(SETTINGS, operators=operators, **FEW))


CONFIGS = dict(reversed([*THROUGH, *ALSO]))  # the first one of each
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
SCALED = {  # at four places
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
}


@pytest.mark.parametrize(
    ("arch", "config", "operators"),
    [
        ("gemma3_text", SLIDING, "auto"),  # scales its embedding, has four norms a layer
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("gemma3_text", SLIDING | {"tie_word_embeddings": False}, "torch"),
                ("gemma2", SLIDING | {"final_logit_softcapping": 5.0}, "auto"),
                ("granite", SCALED, "auto"),
                ("smollm3", {"no_rope_layers": [1, 0], "attention_bias": True}, "torch"),
            )
        ),
    ],
)
def test_bases_that_transformers_computes_wear_all_of_it_as_peft_does(
    tmp_path: Path, arch: str, config: dict[str, Any], operators: OperatorsName
) -> None:
    wardrobe = Wardrobe(tmp_path, arch, **config)
    check_all(wardrobe, replace(SETTINGS, operators=operators, **FEW))


@pytest.mark.parametrize("operators", ["auto", "torch"])
@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=[] if arch in ("gpt2", "phi3") else [pytest.mark.long])
        for arch in THROUGH_TRANSFORMERS
    ],
)
def test_every_base_that_transformers_computes_wears_what_it_can_as_peft_does(
    tmp_path: Path, arch: str, operators: OperatorsName
) -> None:
    config = CONFIGS[arch]
    if "sliding_window" in config:  # what a prompt tunes is to be in sight
        config = config | {"sliding_window": 40}
    wardrobe = Wardrobe(tmp_path, arch, cases_of(arch), **config)
    check_all(wardrobe, replace(SETTINGS, operators=operators, **FEW))


@pytest.mark.long
@pytest.mark.parametrize("operators", ["auto", "torch"])
@pytest.mark.parametrize("arch", ["gemma3_text", "gpt2", "phi"])
def test_in_bfloat16_bases_that_transformers_computes_are_as_near_to_peft_as_peft_itself(
    tmp_path: Path, arch: str, operators: OperatorsName
) -> None:
    wardrobe = Wardrobe(tmp_path, arch, cases_of(arch))
    settings = replace(SETTINGS, operators=operators, dtype="bfloat16")
    check_rounded(wardrobe, read_model(wardrobe.base, settings))


def check_all(wardrobe: Wardrobe, settings: EngineSettings) -> None:
    """Hold the base's own rows to it, too: an adapter changes the modules that they go through."""
    results = run_mixed(wardrobe, read_model(wardrobe.base, settings), settings)
    bare = Oracle(wardrobe.base.path)
    for title in wardrobe.refs:
        check(title, wardrobe, results[title])
        assert bare.largest_error(prompt_of(f"base {title}"), results[f"base {title}"]) < BOUND


def the_bases(_: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return base


def of_other_tokens(saved: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return saved.roll(1, 0)


@pytest.mark.parametrize("other", [the_bases, of_other_tokens])
@pytest.mark.parametrize("case", MATRICES, ids=titled)
def test_it_is_the_saved_embedding_and_head_that_answer(
    case: Case,
    other: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    wardrobe: Wardrobe,
    results: dict[str, Result],
    tmp_path: Path,
) -> None:
    """The control of these cases: with another matrix beside the same LoRA PEFT answers else."""
    folder = shutil.copytree(wardrobe.saved[case.title], tmp_path / "other")
    tensors = load_file(folder / "adapter_model.safetensors")
    base = load_file(wardrobe.base.path / "model.safetensors")["model.embed_tokens.weight"]
    matrices = [
        name for name in tensors if name.endswith(("embed_tokens.weight", "lm_head.weight"))
    ]
    for name in matrices:
        changed = tensors | {name: other(tensors[name], base)}
        save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})
        oracle = Oracle(wardrobe.base.path, folder)
        assert oracle.largest_error(prompt_of(case.title), results[case.title]) > 100 * BOUND
    assert matrices


@pytest.mark.parametrize("case", TIED, ids=titled)
def test_tied_matrices_are_stored_as_peft_reads_them_without_a_tie(
    case: Case, wardrobe: Wardrobe, results: dict[str, Result], tmp_path: Path
) -> None:
    stored = wardrobe.registry.find_files(wardrobe.refs[case.title]).read()
    assert b"tying" not in stored.config
    (tmp_path / "adapter_config.json").write_bytes(stored.config)
    (tmp_path / "adapter_model.safetensors").write_bytes(stored.weights)
    oracle = Oracle(wardrobe.base.path, tmp_path)
    assert oracle.largest_error(prompt_of(case.title), results[case.title]) < BOUND


def test_a_tied_head_that_is_not_the_embedding_is_refused(
    wardrobe: Wardrobe, tmp_path: Path
) -> None:
    """PEFT reads both into one matrix, and the last one stays."""
    folder = shutil.copytree(wardrobe.saved[TIED[0].title], tmp_path / "other")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(Refused, match="peft loads only one"):
        wardrobe.push(folder)


def test_rows_of_the_base_beside_them_are_the_base(
    wardrobe: Wardrobe, results: dict[str, Result]
) -> None:
    oracle = Oracle(wardrobe.base.path)
    for title, result in results.items():
        if title not in wardrobe.refs:
            assert result.tokens == oracle.greedy(prompt_of(title), LENGTH)
            assert oracle.largest_error(prompt_of(title), result) < BOUND


@pytest.mark.parametrize("case", REFUSED, ids=titled)
def test_what_cannot_be_worn_is_refused_at_push_with_the_reason(
    case: Case, wardrobe: Wardrobe, tmp_path: Path
) -> None:
    saved = make(case, wardrobe.base.path, tmp_path / "saved")
    with pytest.raises(Refused) as refusal:
        wardrobe.push(saved)
    assert case.says in refusal.value.message


@pytest.mark.parametrize("kind", REFUSED_TYPES)
def test_a_type_that_nothing_can_wear_is_refused_by_its_name(
    kind: str, wardrobe: Wardrobe, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Refused) as refusal:
        wardrobe.push(tmp_path)
    assert REFUSED_TYPES[kind] in refusal.value.message


def test_every_type_that_peft_has_is_worn_or_refused_by_its_name() -> None:
    answered = {"LORA", *FORMS, *VECTOR_TYPES, *REFUSED_TYPES}
    assert answered == {kind.value for kind in PeftType}


def test_the_table_of_the_page_is_what_these_cases_say() -> None:
    page = (Path(__file__).parents[1] / "docs/peft.md").read_text()
    assert f"{START}{table()}\n{END}" in page, "run `make docs`"
