"""A recipe: one `recipe.toml` that says how to make the next version of an adapter."""

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from registry.adapter import AdapterName
from registry.config import MAX_RANK
from registry.errors import InvalidName
from registry.jsonfile import canonical
from training.errors import RecipeError

FILE = "recipe.toml"
FILE_KEYS = ("path", "validation_path", "held_out_path")  # of [data]: relative to the recipe
TASK_FILES = ("function", "general_text", "general_questions")  # of [task], likewise
OWN_QUESTIONS = "general"  # of replay.source: the one that is no file
PATH_KEYS = (
    "preference.path",
    "replay.source",
    *(f"data.{key}" for key in FILE_KEYS),
    *(f"task.{key}" for key in TASK_FILES),
)

Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Shots = Annotated[int, Meta(ge=0, le=64)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Tracker = Literal["trackio", "tensorboard", "wandb", "mlflow"]
FunctionPlace = Annotated[str, Meta(pattern=r"^[^:]+\.py:[A-Za-z_]\w*$")]  # FILE.py:NAME

MethodKind = Literal[
    "lora",
    "rslora",
    "dora",
    "pissa",
    "olora",
    "eva",
    "loha",
    "lokr",
    "ia3",
    "prompt-tuning",
    "prefix-tuning",
    "qlora",
    "full",
    "fewshot",
    "base",
]
_LORA_KEYS = ("r", "alpha", "dropout", "targets")
METHOD_KEYS: dict[MethodKind, tuple[str, ...]] = {  # what a kind does not use is refused by name
    "lora": _LORA_KEYS,
    "rslora": _LORA_KEYS,
    "dora": (*_LORA_KEYS, "max_rank"),
    "pissa": _LORA_KEYS,
    "olora": _LORA_KEYS,
    "eva": _LORA_KEYS,
    "loha": ("r", "alpha", "targets", "max_rank"),
    "lokr": ("r", "alpha", "targets", "max_rank"),
    "ia3": (),
    "prompt-tuning": ("tokens",),
    "prefix-tuning": ("tokens",),
    "qlora": _LORA_KEYS,
    "full": (),
    "fewshot": (),
    "base": (),
}
# Turned off, these are the base: the reference of preference training.
PREFERENCE_KINDS: tuple[MethodKind, ...] = ("lora", "rslora", "dora", "eva", "qlora")


DataFormat = Literal["prompt-completion", "messages", "alpaca"]
PROMPT_KINDS = ("fewshot", "base")  # nothing is trained: the version is a prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A data set on the Hub, read file by file."""

    repo: Name
    revision: Name = "main"
    train: Name  # a file in the repo: .csv, .jsonl or .parquet
    validation: Name | None = None
    held_out: Name | None = None
    rename: dict[str, str] = field(default_factory=dict[str, str])  # its column → ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which examples of the training side are used."""

    near_duplicates: Annotated[float, Meta(gt=0, le=1)] | None = None  # this alike are left out
    rows: Count | None = None  # at most so many, chosen by the rule
    by: Literal["diverse", "balanced", "hard", "easy"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """Where examples come from: a builder, files, or the Hub. `path` wins over `hub`."""

    builder: Name | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])  # the builder checks them
    path: Name | None = None  # .csv or .jsonl, relative to the recipe
    validation_path: Name | None = None  # a second file, instead of a share
    held_out_path: Name | None = None  # and a third
    hub: HubSource | None = None
    format: DataFormat | None = None  # without one, the columns tell
    licence: Name | None = None  # of the rows; goes into the data card
    prompt: Name = "prompt"  # column of what the user says
    completion: Name = "completion"  # column of what is to be answered
    group: Name | None = None  # column; without one, equal texts are a group
    labels: tuple[Name, ...] = ()  # keep only the rows with one of these completions
    held_out: Annotated[float, Meta(gt=0, lt=1)] = 0.2  # share of the groups
    validation: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # share of the groups not held out
    train_limit: Count | None = None  # examples, drawn by the seed
    validation_limit: Count | None = None
    held_out_limit: Count | None = None
    selection: Selection = Selection()


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is asked of the model and how an answer is judged."""

    system: Annotated[str, Meta(min_length=1, max_length=4000)]
    metric: Literal["exact", "label", "json", "rouge-l", "chrf", "function"]
    function: FunctionPlace | None = None
    general_text: Name | None = None  # a file, one text a line; what forgetting is measured on
    general_questions: Name | None = None  # JSONL of question and answers, likewise
    max_new_tokens: Annotated[int, Meta(ge=1, le=4096)] = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How the model is made to answer differently. Each kind uses some of the keys: METHOD_KEYS."""

    kind: MethodKind = "lora"
    r: Annotated[int, Meta(ge=1, le=MAX_RANK)] = 16
    alpha: Annotated[int, Meta(ge=1, le=1024)] = 32
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | tuple[Name, ...] = "all-linear"
    max_rank: Annotated[int, Meta(ge=1, le=MAX_RANK)] = 64  # of the LoRA that is made of it
    tokens: Annotated[int, Meta(ge=1, le=1024)] = 20

    @property
    def settings(self) -> dict[str, Any]:
        """Return the kind and the keys that it uses: what a run depends on."""
        return {key: getattr(self, key) for key in ("kind", *METHOD_KEYS[self.kind])}


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """How long and how fast."""

    steps: Count
    batch_size: Annotated[int, Meta(ge=1, le=4096)] = 8
    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 1e-3
    warmup: Share = 0.1  # of the steps
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up
    weight_decay: Share = 0.0
    max_grad_norm: Positive = 1.0
    max_length: Annotated[int, Meta(ge=8, le=131_072)] = 256  # tokens of prompt and completion
    too_long: Literal["error", "drop"] = "error"  # never cut
    save_every: Count = 25  # steps between checkpoints
    eval_every: Count | None = None  # steps between two looks at the validation loss
    patience: Count | None = None  # looks without a better loss, then stop; the best is kept
    neftune_alpha: Positive | None = None  # noise on the embeddings (arXiv 2310.05914)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """General questions with the base's own answers among the rows, against forgetting."""

    share: Annotated[float, Meta(gt=0, lt=1)] = 0.125  # of the rows
    source: Name = OWN_QUESTIONS  # our own questions, or a .txt or .jsonl relative to the recipe
    system: Annotated[str, Meta(max_length=4000)] = ""  # "": what the chat template says itself
    max_new_tokens: Annotated[int, Meta(ge=1, le=4096)] = 64  # of an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Direct preference optimisation (arXiv 2305.18290): pairs instead of answers."""

    path: Name  # .jsonl of {prompt, chosen, rejected}, relative to the recipe
    beta: Positive = 0.1  # how dear it is to move away from the base


@dataclass(frozen=True, slots=True, kw_only=True)
class FewShot:
    """How a prompt with examples is found, for method.kind = "fewshot"."""

    k: Annotated[tuple[Shots, ...], Meta(min_length=1, max_length=16)] = (0, 1, 4, 8)
    choose: Literal["fixed", "random", "class-covering", "nearest"] = "class-covering"
    draws: Annotated[int, Meta(ge=1, le=20)] = 3  # where the choice is drawn
    labels: Literal["auto"] | bool = "auto"  # list labels or JSON forms; auto: measure both
    text: Annotated[str, Meta(min_length=1, max_length=16_000)] | None = None  # instead of the list
    items: Count = 48  # at most so many questions are asked, drawn by the seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What the held-out metric must reach before the version may be promoted."""

    min_value: Share | None = None
    min_gain: Share | None = None  # over the base model, on the same examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to make the next version of one adapter."""

    name: str  # namespace/name to push to
    base: Name  # what `wardrobe base pull` takes
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    data: DataSource
    task: Task
    method: Method = Method()
    train: Train
    replay: Replay | None = None
    preference: Preference | None = None
    fewshot: FewShot = FewShot()
    gate: Gate = Gate()
    report_to: tuple[Tracker, ...] = ()  # who is told each step; changes no byte of the adapter
    folder: Path = Path()  # where recipe.toml was; no key of it

    @property
    def digest(self) -> str:
        """Hash every key but report_to and the paths of files, whose content has a digest."""
        value = _as_toml(self)
        for key in FILE_KEYS:
            del value["data"][key]
        for key in TASK_FILES:  # other content judges otherwise
            if place := value["task"][key]:
                value["task"][key] = _file_digest(self.folder, f"task.{key}", place)
        if self.preference is not None:
            del value["preference"]["path"]
        if self.replay is not None:
            del value["replay"]["source"]
        del value["report_to"]
        return hashlib.sha256(canonical(value)).hexdigest()


def load_recipe(place: Path) -> Recipe:
    """Read a recipe from its file or from the folder that holds `recipe.toml`."""
    path = place / FILE if place.is_dir() else place
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"There is no recipe at {path}. A recipe is a folder with {FILE}."
        ) from None
    except ValueError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}.") from error
    return parse_recipe(value, path.parent)


def parse_recipe(value: Mapping[str, Any], folder: Path) -> Recipe:
    """Check keys, types and bounds, then the rules between them."""
    _refuse_unknown_keys(value, Recipe, "")
    if _kind_of(value) in PROMPT_KINDS:
        value = {"train": {"steps": 1}, **value}  # nothing is trained
    try:
        recipe = msgspec.convert(value, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"The recipe in {folder} is wrong: {error}.") from error
    _check_source(recipe.data)
    _check_method(value.get("method", {}), recipe.method)
    _check_task(recipe.task)
    _check_training(recipe)
    try:
        AdapterName.parse(recipe.name)
    except InvalidName as error:
        raise RecipeError(f"The recipe's name cannot be pushed to. {error.message}") from error
    return replace(recipe, folder=folder)


def apply_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return the recipe with `key=value` pairs set, such as `train.steps=20`.

    A value is read as TOML, and as plain text when it is none. Paths given here are relative to
    the working directory, as the shell completes them. Another `method.kind` keeps the keys of the
    recipe that it uses too, and leaves out the others.
    """
    value = _without_none(_as_toml(recipe))
    # The kind comes first: the other overrides are then checked against its keys.
    for override in sorted(overrides, key=lambda text: not text.startswith("method.kind=")):
        key, equals, text = override.partition("=")
        if not equals:
            raise RecipeError(f"{override!r} sets nothing: write key=value, as in train.steps=20.")
        _set(value, key.strip(), _toml_value(text.strip()))
        if key.strip() == "method.kind":
            value["method"] = _usable(value["method"])
            if _kind_of(value) in PROMPT_KINDS:
                value.pop("replay", None)
        if key.strip() in PATH_KEYS and text.strip() != OWN_QUESTIONS:
            _set(value, key.strip(), str(Path(text.strip()).absolute()))
    return parse_recipe(value, recipe.folder)


def _kind_of(value: Mapping[str, Any]) -> Any:
    method = value.get("method")
    return method.get("kind") if isinstance(method, Mapping) else None


def _as_toml(recipe: Recipe) -> dict[str, Any]:
    value = asdict(recipe) | {"method": recipe.method.settings}
    del value["folder"]
    return value


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is not set: TOML has no null."""
    return {
        key: _without_none(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if item is not None
    }


def _set(value: dict[str, Any], key: str, new: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = value.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{key!r} is no key of a recipe: {parent!r} holds a value.")
        value = inner
    value[last] = new


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


def _check_source(data: DataSource) -> None:
    files = data.path is not None or data.hub is not None
    if (data.builder is not None) == files:
        raise RecipeError(
            "[data] needs exactly one source: builder = NAME, or path = FILE, or [data.hub]."
        )
    for key in ("validation_path", "held_out_path"):
        if getattr(data, key) is not None and data.path is None:
            raise RecipeError(f"data.{key} needs data.path: the file to train on.")
    if (data.selection.rows is None) != (data.selection.by is None):
        raise RecipeError(
            "data.selection.rows and data.selection.by need each other: how many, and by which "
            "rule. data.train_limit draws by chance."
        )


def _check_task(task: Task) -> None:
    if (task.metric == "function") != (task.function is not None):
        raise RecipeError(
            f"task.metric is {task.metric!r} and task.function is {task.function!r}: a function "
            'needs metric = "function" and function = "FILE.py:NAME", and only that metric has one.'
        )


def _file_digest(folder: Path, key: str, place: str) -> str:
    """Return the hash of a file, and the name of the function in it where there is one."""
    file, colon, name = place.partition(":")
    path = folder / file
    if not path.is_file():
        raise RecipeError(f"{key} = {place!r}: there is no file {path}.")
    return hashlib.sha256(path.read_bytes()).hexdigest() + colon + name


def _check_method(given: Mapping[str, Any], method: Method) -> None:
    used = METHOD_KEYS[method.kind]
    if unused := [key for key in given if key not in ("kind", *used)]:
        raise RecipeError(
            f"method.{unused[0]} does nothing for method.kind = {method.kind!r}, which uses "
            f"{', '.join(used) or 'no other key'}. Take it out."
        )
    if method.kind in ("pissa", "olora", "eva") and 2 * method.r > MAX_RANK:
        raise RecipeError(
            f"method.r = {method.r} is too large for method.kind = {method.kind!r}: its adapter "
            f"has up to twice that rank, and {MAX_RANK} is the highest. Give {MAX_RANK // 2} or "
            "less."
        )


def _usable(method: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that the kind uses; all of them when there is no such kind."""
    used = METHOD_KEYS.get(method["kind"], tuple(method))
    return {key: item for key, item in method.items() if key == "kind" or key in used}


def _check_training(recipe: Recipe) -> None:
    train = recipe.train
    if train.patience is not None and train.eval_every is None:
        raise RecipeError(
            "train.patience counts looks at the validation loss: set train.eval_every, too."
        )
    if recipe.method.kind in PROMPT_KINDS and recipe.replay is not None:
        raise RecipeError(
            f"[replay] does nothing for method.kind = {recipe.method.kind!r}, which trains "
            "nothing. Take it out."
        )
    if recipe.preference is None:
        return
    for key, value in (
        ("train.eval_every", train.eval_every),
        ("train.neftune_alpha", train.neftune_alpha),
        ("[replay]", recipe.replay),
    ):
        if value is not None:
            raise RecipeError(f"{key} does nothing for [preference] pairs. Take one of them out.")
    if recipe.method.kind not in PREFERENCE_KINDS:
        raise RecipeError(
            f"[preference] compares an adapter with the base under it, and method.kind = "
            f"{recipe.method.kind!r} leaves none. Take one of {', '.join(PREFERENCE_KINDS)}."
        )


def _refuse_unknown_keys(value: Any, shape: type, where: str) -> None:
    """Walk the tables that are dataclasses; others (options, rename) are free."""
    if not isinstance(value, Mapping):
        return
    hints = get_type_hints(shape)
    known = [f.name for f in fields(shape) if f.name != "folder"]
    for key, item in value.items():
        if key not in known:
            raise RecipeError(
                f"{where}{key} is no key of a recipe. Known here: {', '.join(known)}."
            )
        for inner in (hints[key], *get_args(hints[key])):
            if is_dataclass(inner) and isinstance(inner, type):
                _refuse_unknown_keys(item, inner, f"{where}{key}.")
