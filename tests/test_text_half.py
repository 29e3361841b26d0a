"""Bases that also see: their text half is served, and adapters trained on the whole fit it."""

import copy
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from typer.testing import CliRunner

from registry.adapter import AdapterName
from registry.base import BaseModel, Bases
from registry.chat import ChatEncoder
from registry.convert import convert
from registry.errors import Refused
from registry.store import Registry
from registry.text_half import keep_text, text_config
from registry.validate import validate
from serving.engine.engine import TorchEngine
from serving.engine.settings import OperatorsName
from tests import tiny
from tests.serving.engine.driving import Folders, Oracle, mixed_requests, run_all
from tests.serving.engine.test_bases_against_peft import BOUND, LATER, LENGTH, SETTINGS
from training.base import pull_base
from training.progress import Progress
from wardrobe import app

TEXT: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": tiny.EOS_ID,
    "pad_token_id": tiny.EOS_ID,
}
SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# The kind of the whole, what its decoder has, and what the whole has.
WHOLES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma 3": (
        "gemma3",
        {
            "model_type": "gemma3_text",
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {
            "vision_config": SIGHT | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral small 3": (
        "mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {
            "vision_config": SIGHT | {"model_type": "pixtral", "head_dim": 16},
            "tie_word_embeddings": False,
        },
    ),
    "ministral 3": (
        "mistral3",
        {"model_type": "ministral3", "tie_word_embeddings": True, **LATER},
        {"vision_config": SIGHT | {"model_type": "pixtral", "head_dim": 16}},
    ),
}


def quiet(progress: Progress) -> None:
    pass


def make_whole(folder: Path, name: str, **saving: Any) -> Path:
    """Write a random base that also sees, with a tokenizer of bytes."""
    kind, text, whole = WHOLES[name]
    config = AutoConfig.for_model(kind, text_config=TEXT | text, **whole)
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 1 + 0.1 * noise)
    model.save_pretrained(folder, **saving)
    tokens = tiny.make_base(folder.with_name(f"{folder.name}-tokens"), layers=1)
    for path in tokens.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def make_adapter(folder: Path, whole: Path, config: PeftConfig, seed: int) -> Path:
    """Train nothing, but write what training on texts alone would: B of what sees stays zero."""
    model = AutoModelForImageTextToText.from_pretrained(whole, dtype=torch.float32)
    with tiny.peft_on_new_transformers():
        peft = get_peft_model(model, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if weight.requires_grad and "vision" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    peft.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "tiny"}))
    return folder


class WholeOracle(Oracle):
    """The whole, asked about a text."""

    def __init__(self, whole: Path, adapter: Path | None = None) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(whole, dtype=torch.float32)
        if adapter is not None:
            with tiny.peft_on_new_transformers():
                self.model = PeftModel.from_pretrained(
                    self.model, str(adapter), autocast_adapter_dtype=False
                )
        self.model.eval()


def lora(**options: Any) -> LoraConfig:
    settings: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]} | options
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)


ADAPTERS: dict[str, PeftConfig] = {
    "some": lora(target_modules=["q_proj", "v_proj", "down_proj"]),
    "all": lora(target_modules="all-linear", rank_pattern={"down_proj": 8}),
    "loha": LoHaConfig(r=4, alpha=8, target_modules=["k_proj", "up_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("operators", ["auto", "torch"])
@pytest.mark.parametrize("name", WHOLES)
def test_the_text_half_gives_what_the_whole_gives_for_a_text_and_wears_its_adapters(
    tmp_path: Path, name: str, operators: OperatorsName
) -> None:
    whole = make_whole(tmp_path / "whole", name)
    base = pull_base(str(whole), bases := Bases(tmp_path / "bases"), progress=quiet, base_id="tiny")
    trained = {
        title: make_adapter(tmp_path / title, whole, config, seed)
        for seed, (title, config) in enumerate(ADAPTERS.items())
    }
    kept = {title: text_of(folder, bases) for title, folder in trained.items()}
    rng, folders = random.Random(1), Folders(kept)
    names = [*ADAPTERS, None, *ADAPTERS, None]
    wanted = mixed_requests(names, folders, rng, LENGTH)
    engine = TorchEngine.create(base, folders, replace(SETTINGS, operators=operators))
    results = run_all(engine, wanted)
    oracles = {title: WholeOracle(whole, trained.get(title or "")) for title in {*names}}
    for title, each, result in zip(names, wanted, results, strict=True):
        likeliest = oracles[title].likeliest(each.prompt_ids, result.tokens)
        assert result.tokens == likeliest, title
        assert oracles[title].largest_error(each.prompt_ids, result) < BOUND, title
        wrong = oracles["some" if title is None else None]
        assert wrong.largest_error(each.prompt_ids, result) > 100 * BOUND, title


def text_of(adapter: Path, bases: Bases) -> Path:
    """Return a copy of an adapter as a push stores it."""
    folder = Path(shutil.copytree(adapter, adapter.with_name(f"{adapter.name}-text")))
    told = keep_text(folder, bases)
    assert told is not None
    assert told[0] == "converted"
    convert(folder, bases)
    warnings = validate(folder, bases).warnings
    assert {code for code, _ in warnings} <= {"targets_written_out"}  # of expressions
    return folder


def test_a_pulled_text_half_is_an_ordinary_base(tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "whole", "mistral small 3", max_shard_size="100KB")
    assert len([*whole.glob("*.safetensors")]) > 2
    config = json.loads((whole / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    steps: list[Progress] = []
    base = pull(whole, tmp_path / "bases", steps)
    read = json.loads((base.path / "config.json").read_text())
    assert (read["model_type"], read["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert read["tie_word_embeddings"] is False
    assert "its text half" in base.origin
    assert steps[-1].done == steps[-1].total > 0
    assert not [*(tmp_path / "bases" / ".staging").glob("*/*")], "the whole is gone"
    assert not [name for name in base.linears if "vision" in name or "projector" in name]
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    ids = torch.tensor([[5, 7, 11]])
    with torch.inference_mode():
        torch.testing.assert_close(plain(ids).logits, WholeOracle(whole).model(ids).logits)
    # A quantised one is refused as such.
    (whole / "config.json").write_text(json.dumps(config))
    other = pull(whole, tmp_path / "others", steps)
    assert json.loads((other.path / "config.json").read_text())["quantization_config"]


Q0 = "language_model.layers.0.self_attn.q_proj"
NAMED: dict[str, PeftConfig] = {
    "an alpha by the end of a name in the whole": lora(alpha_pattern={Q0: 64}),
    "an alpha by a whole name": lora(alpha_pattern={f"^model.{Q0}": 64}),
    "an alpha by an escaped name": lora(alpha_pattern={f"model.{Q0}".replace(".", r"\."): 64}),
    "an alpha of what the whole has not": lora(
        alpha_pattern={"model.layers.0.self_attn.q_proj": 64}
    ),
    "two alphas, of which one is of another version": lora(
        alpha_pattern={f"model.{Q0}": 64, Q0.replace("model.", "model.model."): 8}
    ),
    "a rank by the end of a name": lora(rank_pattern={Q0: 16}),
    "targets by the end of a name": lora(target_modules=[Q0, "layers.1.mlp.up_proj"]),
    "an expression": lora(target_modules=r".*language_model.*\.(q_proj|down_proj)"),
    "without what sees": lora(exclude_modules=["vision_tower"]),
    "one layer": lora(layers_to_transform=[1], layers_pattern="language_model.layers"),
    "saved parts": lora(modules_to_save=["model.language_model.embed_tokens", "lm_head"]),
    "tokens": lora(trainable_token_indices={"model.language_model.embed_tokens": [3, 65, 66, 67]}),
    "some tokens": TrainableTokensConfig(
        target_modules="model.language_model.embed_tokens",
        token_indices=[3, 65, 66, 67],
        task_type="CAUSAL_LM",
    ),
}


@pytest.mark.filterwarnings(
    "ignore:The following .*_pattern keys did not match",
    "ignore:Model has `tie_word_embeddings=True`",
)
def test_modules_that_are_named_as_in_the_whole_are_worn_as_there(tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "whole", "gemma 3")
    base = pull_base(str(whole), bases := Bases(tmp_path / "bases"), progress=quiet, base_id="tiny")
    trained = {
        title: make_adapter(tmp_path / f"a{seed}", whole, config, seed)
        for seed, (title, config) in enumerate(NAMED.items())
    }
    folders = Folders({title: text_of(folder, bases) for title, folder in trained.items()})
    wanted = mixed_requests([*NAMED], folders, random.Random(1), LENGTH)
    results = run_all(TorchEngine.create(base, folders, SETTINGS), wanted)
    bare = WholeOracle(whole)
    for title, each, result in zip(NAMED, wanted, results, strict=True):
        error = WholeOracle(whole, trained[title]).largest_error(each.prompt_ids, result)
        assert error < BOUND, title
        assert bare.largest_error(each.prompt_ids, result) > 100 * BOUND, title


@pytest.mark.parametrize(
    ("field", "value"),
    [("exclude_modules", [None, 5]), ("target_modules", ["q_proj", 5]), ("modules_to_save", [7])],
)
def test_what_is_no_name_is_refused_as_on_every_base(
    tmp_path: Path, field: str, value: Sequence[Any]
) -> None:
    whole = make_whole(tmp_path / "whole", "gemma 3")
    bases = Bases(tmp_path / "bases")
    pull_base(str(whole), bases, progress=quiet, base_id="tiny")
    adapter = make_adapter(tmp_path / "a", whole, lora(target_modules=["q_proj"]), 1)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(Refused, match=field):
        keep_text(adapter, bases)


def test_the_configuration_of_the_decoder_has_what_both_say() -> None:
    text = {"hidden_size": 64, "eos_token_id": 1, "final_logit_softcapping": 2.0}
    whole = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    found = text_config(whole | {"dtype": "bfloat16", "quantization_config": {"bits": 4}})
    assert found == {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 64,
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,  # the whole reads no such thing
        "dtype": "bfloat16",
        "quantization_config": {"bits": 4},
    }
    own = {"model_type": "ministral3", "dtype": "float32", "bos_token_id": 3}
    found = text_config({"model_type": "mistral3", "text_config": own, "dtype": "bfloat16"})
    assert found == own | {"architectures": ["Ministral3ForCausalLM"]}
    assert text_config({"model_type": "mistral3", "text_config": {"model_type": "llama"}}) is None
    for kind in ("llama", [], {}, None):
        assert text_config({"model_type": kind, "text_config": text}) is None
        assert text_config(whole | {"text_config": {"model_type": kind}}) is None
    assert text_config({"model_type": "gemma3"}) is None


def test_the_text_half_has_the_tokens_and_the_template_of_the_whole(tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "whole", "gemma 3")
    for path in whole.glob("chat_template*"):
        path.unlink()
    path = whole / "tokenizer_config.json"
    told = json.loads(path.read_text())
    told.pop("chat_template", None)
    path.write_text(json.dumps(told))
    (whole / "chat_template.json").write_text('{"chat_template": "so {{ messages[0].content }}"}')
    beside = tmp_path / "bases" / ".staging" / "tiny.text" / "model.safetensors"
    beside.parent.mkdir(parents=True)
    beside.touch()
    base = pull(whole, tmp_path / "bases", [])
    assert beside.exists(), "the base `tiny.text` is being prepared there"
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(base.path))
    assert encoder.text([{"role": "user", "content": "hi"}]) == "so hi"


def test_a_whole_with_tensors_of_neither_half_is_refused(tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "whole", "gemma 3")
    path = whole / "model.safetensors"
    save_file(load_file(path) | {"audio_tower.x": torch.ones(1)}, path, {"format": "pt"})
    with pytest.raises(Refused, match=r"audio_tower\.x"):
        pull(whole, tmp_path / "bases", [])


def test_the_command_says_that_no_image_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARDROBE_CACHE", str(tmp_path / "cache"))
    make_whole(tmp_path / "whole", "gemma 3")
    pulled = CliRunner().invoke(app, ["base", "pull", str(tmp_path / "whole"), "--id", "tiny"])
    assert "its text half was kept, and no image is served" in pulled.stdout.replace("\n", " ")


def pull(whole: Path, bases: Path, steps: list[Progress]) -> BaseModel:
    return pull_base(str(whole), Bases(bases), progress=steps.append, base_id="tiny")


def test_the_whole_that_an_interrupted_pull_left_goes_with_the_next(tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "whole", "gemma 3")
    pull(whole, tmp_path / "bases", [])
    left = shutil.copytree(whole, tmp_path / "bases" / ".staging" / "tiny")
    pull(whole, tmp_path / "bases", [])
    assert not left.exists()


@pytest.mark.parametrize("before", ["model.language_model.", "language_model.model."])
def test_a_push_keeps_the_text_half_says_so_and_is_the_same_version_again(
    tmp_path: Path, before: str
) -> None:
    whole = make_whole(tmp_path / "whole", "gemma 3")
    bases = Bases(tmp_path / "bases")
    pull_base(str(whole), bases, progress=quiet, base_id="tiny")
    names = ["model.language_model.layers.1.mlp.up_proj", "fc1", "q_proj"]
    adapter = make_adapter(tmp_path / "a", whole, lora(target_modules=names), 1)
    rename(adapter, "model.language_model.", before)
    with Registry.open(tmp_path / "home", bases) as registry:
        pushed = registry.push(adapter, AdapterName("acme", "a"), actor="test")
        again = registry.push(adapter, AdapterName("acme", "a"), actor="test")
    assert pushed.version.digest == again.version.digest
    [(code, text)] = pushed.warnings
    assert code == "converted"
    assert "its text half is kept. 10 tensors of what sees were left out" in text
    assert (adapter / "adapter_model.safetensors").exists(), "the pushed folder is left as it is"


def rename(adapter: Path, what: str, by: str) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {name.replace(what, by): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace(what, by))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["language_model.model.layers.0.self_attn.q_proj", "tower.x"], "tower.x"),
        (["language_model.model.layers.9.self_attn.q_proj"], "layers.9"),
        (
            [
                f"{each}.layers.0.mlp.up_proj"
                for each in ("language_model.model", "model.language_model")
            ],
            "language_model",
        ),
    ],
)
def test_what_is_of_neither_half_is_refused(
    tmp_path: Path, names: Sequence[str], says: str
) -> None:
    whole = make_whole(tmp_path / "whole", "gemma 3")
    bases = Bases(tmp_path / "bases")
    pull_base(str(whole), bases, progress=quiet, base_id="tiny")
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(
        {
            f"base_model.model.{name}.lora_{half}.weight": torch.ones(shape)
            for name in names
            for half, shape in (("A", (4, 64)), ("B", (64, 4)))
        },
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": [*names]}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "tiny"})
    )
    with (
        Registry.open(tmp_path / "home", bases) as registry,
        pytest.raises(Refused, match=says),
    ):
        registry.push(folder, AdapterName("acme", "a"), actor="test")


def test_an_adapter_of_a_text_base_is_left_alone(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base")
    adapter = tiny.make_adapter(tmp_path / "a", base)
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert keep_text(adapter, Bases(tmp_path)) is None
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
