import json
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from registry.base import RECORD, Bases
from registry.errors import BaseNotFound, Conflict, IntegrityError, InvalidName, Refused
from registry.home import default_cache, default_home


def make_base(folder: Path, *, seed: int = 0, shards: int = 1) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((16, 8)).astype(np.float32),
        "model.layers.0.self_attn.q_proj.weight": rng.standard_normal((8, 8)).astype(np.float32),
        "model.layers.0.mlp.up_proj.weight": rng.standard_normal((12, 8)).astype(np.float32),
        "model.norm.weight": np.ones(8, np.float32),
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(names)}
    for part in sorted(set(weight_map.values())):
        save_file({n: tensors[n] for n in names if weight_map[n] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_an_added_base_is_listed_and_found_and_gone_from_where_it_was(tmp_path: Path) -> None:
    bases = Bases(tmp_path / "bases")
    prepared = make_base(tmp_path / "prepared")
    added = bases.add("acme/tiny", prepared, origin="test")
    assert not prepared.exists()
    assert bases.get("acme/tiny") == added == bases.list()[0]
    assert added.origin == "test"
    assert added.linears == {
        "model.layers.0.self_attn.q_proj": (8, 8),
        "model.layers.0.mlp.up_proj": (12, 8),
    }


def test_fingerprints_do_not_depend_on_sharding_and_see_every_weight(tmp_path: Path) -> None:
    bases = Bases(tmp_path / "bases")
    one = bases.add("one", make_base(tmp_path / "a"), origin="test")
    sharded = bases.add("sharded", make_base(tmp_path / "b", shards=3), origin="test")
    other = bases.add("other", make_base(tmp_path / "c", seed=1), origin="test")
    assert one.fingerprint == sharded.fingerprint != other.fingerprint
    assert one.structure == sharded.structure == other.structure


def test_adding_the_same_weights_again_is_idempotent_and_other_weights_conflict(
    tmp_path: Path,
) -> None:
    bases = Bases(tmp_path / "bases")
    first = bases.add("tiny", make_base(tmp_path / "a"), origin="test")
    assert bases.add("tiny", make_base(tmp_path / "b"), origin="again") == first
    with pytest.raises(Conflict, match="other weights"):
        bases.add("tiny", make_base(tmp_path / "c", seed=1), origin="test")
    assert bases.get("tiny") == first


def test_concurrent_adds_of_one_base_all_return_it(tmp_path: Path) -> None:
    bases = Bases(tmp_path / "bases")
    folders = [make_base(tmp_path / f"p{i}") for i in range(6)]
    results = []
    threads = [
        threading.Thread(target=lambda f=f: results.append(bases.add("tiny", f, origin="t")))
        for f in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert len({base.fingerprint for base in results}) == 1
    assert [base.id for base in bases.list()] == ["tiny"]


def test_an_unknown_base_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound) as missing:
        Bases(tmp_path).get("acme/none")
    assert "wardrobe base pull acme/none" in missing.value.command


@pytest.mark.parametrize("bad", ["../up", "a/b/c", "/abs", "a--b", "a/..", "", ".hidden", "a b"])
def test_a_base_id_never_becomes_a_path_outside_the_folder(tmp_path: Path, bad: str) -> None:
    with pytest.raises(InvalidName):
        Bases(tmp_path).get(bad)


def test_a_truncated_base_is_noticed_without_hashing(tmp_path: Path) -> None:
    bases = Bases(tmp_path / "bases")
    path = bases.add("tiny", make_base(tmp_path / "a"), origin="test").path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="wardrobe base pull tiny"):
        bases.get("tiny")


def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "a", shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../part-0.safetensors"}}))
    with pytest.raises(Refused, match="which is not in"):
        Bases(tmp_path / "bases").add("tiny", folder, origin="test")
    assert not (folder / RECORD).exists()


def test_home_and_cache_follow_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARDROBE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WARDROBE_CACHE", str(tmp_path / "cache"))
    assert default_home() == tmp_path / "home"
    assert default_cache() == tmp_path / "cache"
    monkeypatch.delenv("WARDROBE_HOME")
    monkeypatch.delenv("WARDROBE_CACHE")
    assert default_home().name == default_cache().name == "wardrobe"
