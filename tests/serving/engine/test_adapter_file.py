"""Files of adapters as the compiled operators have them, against torch's way; and what is wrong."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import save

from registry.adapter import AdapterRef
from serving.engine.adapter_file import AdapterReader
from serving.engine.boundary import AdapterFiles, AdapterLoadFailed
from serving.engine.lora import LoraLayout, pack_b, panel_offset
from serving.engine.ops.native.library import Library
from serving.engine.pages import PAGE, PagesAhead, SpareMemory
from serving.engine.spec import LinearGroup
from tests.serving.engine.driving import wait_for_pages

Tensors = dict[str, torch.Tensor]

GROUPS = (
    LinearGroup("qkv", ("q", "k", "v"), 66, (40, 20, 30)),  # parts share panels
    LinearGroup("down", ("down",), 34, (66,)),
)
REF = AdapterRef("0" * 64, "acme/chat@v1")
FILE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _memory_is_never_zero_by_chance() -> Iterator[None]:
    """`torch.empty` gives NaN meanwhile: what is not written is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def modules(layers: int = 2) -> list[tuple[str, int, int]]:
    """Return each linear with its inputs and outputs."""
    return [
        (f"model.layers.{layer}.{module}", group.inputs, outputs)
        for layer in range(layers)
        for group in GROUPS
        for module, outputs in zip(group.modules, group.outputs, strict=True)
    ]


def tensors(rank: int, dtype: torch.dtype, without: str = "") -> Tensors:
    found: Tensors = {}
    for name, inputs, outputs in modules():
        if name != without:
            found[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs).to(dtype)
            found[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank).to(dtype)
    return found


def config(rank: int, **also: Any) -> bytes:
    targets = ["q", "k", "v", "down"]
    raw = {"peft_type": "LORA", "r": rank, "lora_alpha": 12, "target_modules": targets} | also
    return json.dumps({"base_model_name_or_path": "tiny", **raw}).encode()


def files(made: Mapping[str, torch.Tensor], settings: bytes) -> AdapterFiles:
    data = save(dict(made))
    return AdapterFiles(settings, [data[:100], data[100:]])


def reader(library: Library | None, dtype: torch.dtype, max_rank: int = 256) -> AdapterReader:
    layout = LoraLayout(2, GROUPS, packed=library is not None)
    return AdapterReader(layout, dtype, max_rank, library=library)


def expect_torchs_numbers(library: Library, source: AdapterFiles, reads: AdapterReader) -> None:
    by_torch = reader(None, library.dtype)
    wanted, found = by_torch.read(source, REF), reads.read(source, REF)
    assert found.bucket == wanted.bucket
    stacks = reads.layout.stacks(found.weights, found.bucket)
    for name, (a, *bs) in by_torch.layout.stacks(wanted.weights, wanted.bucket).items():
        group = next(group for group in GROUPS if group.name == name)
        packed = [pack_b(b.mT, panel_offset(group, part)) for part, b in enumerate(bs)]
        for here, there in zip(stacks[name], (a, *packed), strict=True):
            assert torch.equal(here, there)
            assert there.any()


@pytest.mark.parametrize("dtype", FILE_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("rank", [1, 7, 8, 16, 20, 256])
def test_a_file_becomes_what_torch_makes_of_it(
    library: Library, rank: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(rank)
    reads = reader(library, library.dtype)
    for without in ("", "model.layers.1.k"):
        expect_torchs_numbers(library, files(tensors(rank, dtype, without), config(rank)), reads)


@pytest.mark.parametrize("dtype", FILE_DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_numbers_that_begin_at_an_odd_byte_are_read(library: Library, dtype: torch.dtype) -> None:
    data = save(tensors(7, dtype))
    length = int.from_bytes(data[:8], "little")
    odd = (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    expect_torchs_numbers(library, AdapterFiles(config(7), [odd]), reader(library, library.dtype))


def test_halves_of_every_size_are_read(library: Library) -> None:
    numbers = torch.arange(1 << 16).to(torch.uint16).view(torch.float16)
    numbers = numbers[numbers.isfinite()]
    made = {name: torch.ones_like(each) for name, each in tensors(16, torch.float16).items()}
    for name, each in made.items():
        taken, numbers = numbers[: each.numel()], numbers[each.numel() :]
        each.view(-1)[: len(taken)] = taken
        if "lora_B" in name:  # scaled to what is less than normal
            each *= 2.0**-8
    assert len(numbers) < 60000  # most of them have been in
    expect_torchs_numbers(library, files(made, config(16)), reader(library, library.dtype))


def test_files_alike_are_told_apart_by_what_differs(library: Library) -> None:
    """What is known of one file serves the next one with the same header and configuration only."""
    reads = reader(library, library.dtype)
    pattern = {"rank_pattern": {"down": 4}, "alpha_pattern": {"k": 3}}
    narrow = tensors(8, torch.float32)
    for name, each in narrow.items():
        if ".down." in name:
            narrow[name] = (each[:4] if "lora_A" in name else each[:, :4]).clone()
    for source in (
        files(tensors(8, torch.float32), config(8)),
        files(tensors(8, torch.float32), config(8)),
        files(tensors(8, torch.float32), config(8, lora_alpha=5, use_rslora=True)),
        files(narrow, config(8, **pattern)),
        files(tensors(8, torch.bfloat16), config(8)),
    ):
        expect_torchs_numbers(library, source, reads)


def test_what_is_written_to_memory_that_lay_ready_is_the_same(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpareMemory, "LEAST", 1)
    monkeypatch.setattr(PagesAhead, "DELAY", 0.0)
    reads = reader(library, library.dtype)
    source = files(tensors(8, torch.float32, "model.layers.1.k"), config(8))  # not all are there
    first = reads.read(source, REF)
    wait_for_pages()
    second, other = (
        reads.read(source, REF),
        reads.read(files(tensors(8, torch.float32), config(8)), REF),
    )
    assert len({each.weights.data_ptr() for each in (first, second, other)}) == 3
    assert second.weights.data_ptr() % PAGE == 0, "it lay ready"
    assert torch.equal(first.weights, second.weights)
    assert not torch.equal(second.weights, other.weights)
    expect_torchs_numbers(library, source, reads)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e39])
@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_number_that_is_not_finite_is_refused_by_the_name_of_its_module(
    library: Library, number: float, half: str, place: int
) -> None:
    made = {name: each.double() for name, each in tensors(7, torch.float32).items()}
    name = "model.layers.1.v"
    made[f"base_model.model.{name}.lora_{half}.weight"].view(-1)[place] = number
    made = {name: each.float() for name, each in made.items()}
    reads = reader(library, library.dtype)
    with pytest.raises(AdapterLoadFailed, match=f"a weight of {name} is not a finite number"):
        reads.read(files(made, config(7)), REF)
    with pytest.raises(AdapterLoadFailed, match="a weight of qkv is not a finite number"):
        reader(None, library.dtype).read(files(made, config(7)), REF)


def test_what_only_the_scale_makes_infinite_is_refused(library: Library) -> None:
    made = tensors(8, torch.float32)
    made["base_model.model.model.layers.0.q.lora_B.weight"][3, 3] = 3e38
    with pytest.raises(AdapterLoadFailed, match=r"a weight of model\.layers\.0\.q is not"):
        reader(library, library.dtype).read(files(made, config(8)), REF)


@pytest.mark.parametrize(
    ("rank", "also", "message"),
    [
        (16, {}, "its rank is 16, the engine's highest is 8"),
        (8, {"r": 4}, "A and B have shapes .* the base and config want"),
    ],
)
def test_a_rank_that_does_not_fit_is_refused_each_time(
    library: Library, rank: int, also: dict[str, Any], message: str
) -> None:
    source = files(tensors(rank, torch.float32), config(rank, **also))
    for reads in 2 * [reader(own, library.dtype, max_rank=8) for own in (library, None)]:
        with pytest.raises(AdapterLoadFailed, match=f"acme/chat@v1 cannot be worn: .*{message}"):
            reads.read(source, REF)


def spoilt(change: str) -> Tensors:
    made = tensors(8, torch.float32)
    first = "base_model.model.model.layers.0.q.lora_A.weight"
    if change == "half":
        del made[first]
    elif change == "stranger":
        made["base_model.model.lm_head.other"] = torch.ones(1)
    elif change == "module":
        made[first.replace("0.q", "2.q")] = made.pop(first)
        second = first.replace("_A", "_B")
        made[second.replace("0.q", "2.q")] = made.pop(second)
    elif change == "shape":
        made[first] = made[first].mT.contiguous()
    elif change == "double":
        made[first] = made[first].double()
    else:
        made = {"base_model.model.model.layers.0.q.lora_A.weight": torch.tensor(1.0)}
        made[first.replace("_A", "_B")] = torch.tensor(1.0)
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("half", r"model\.layers\.0\.q has only one of lora_A and lora_B"),
        ("stranger", r"the tensor 'base_model\.model\.lm_head\.other' is nothing"),
        ("module", r"model\.layers\.2\.q is not a linear layer that this base"),
        ("shape", "A and B have shapes"),
        ("double", "is F64; save it as F32, BF16, F16"),
        ("scalars", "A and B have shapes"),
    ],
)
def test_files_that_do_not_fit_the_base_are_refused(
    library: Library, change: str, message: str
) -> None:
    for reads in (reader(library, library.dtype), reader(None, library.dtype)):
        with pytest.raises(AdapterLoadFailed, match=message):
            reads.read(files(spoilt(change), config(8)), REF)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too few"),
        (b"\x00" * 8, "not a safetensors file"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "too few for its header"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
        ((2 << 20).to_bytes(8, "little") + b"{" * (2 << 20), "the limit is 1048576"),
    ],
)
def test_bytes_that_are_no_file_of_tensors_are_refused(
    library: Library, data: bytes, message: str
) -> None:
    with pytest.raises(AdapterLoadFailed, match=message):
        reader(library, library.dtype).read(AdapterFiles(config(8), [data]), REF)


def test_a_file_that_ends_early_is_refused(library: Library) -> None:
    whole = save(tensors(8, torch.float32))
    for data in (whole[:-1], whole + b"\0"):
        with pytest.raises(AdapterLoadFailed, match="its header describes"):
            reader(library, library.dtype).read(AdapterFiles(config(8), [data]), REF)
