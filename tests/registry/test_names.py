import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.adapter import AdapterName, Selector, check_alias
from registry.blobs import blob_key
from registry.errors import IntegrityError, InvalidName

PART = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)
ALIAS = PART.filter(lambda text: not re.fullmatch(r"v[0-9]+", text))
HEX = st.text("0123456789abcdef", min_size=8, max_size=64)
NAMES = st.builds(AdapterName, PART, PART)
SELECTORS = st.one_of(
    st.builds(Selector, NAMES, alias=ALIAS),
    st.builds(Selector, NAMES, number=st.integers(1, 999_999_999)),
    st.builds(Selector, NAMES, digest=HEX),
)


@given(NAMES)
def test_a_name_reads_back_as_it_was_written(name: AdapterName) -> None:
    assert AdapterName.parse(str(name)) == name


@given(SELECTORS)
def test_a_selector_reads_back_as_it_was_written(selector: Selector) -> None:
    assert Selector.parse(str(selector)) == selector


@given(st.text(max_size=80))
def test_any_text_is_a_name_or_is_refused_in_words(text: str) -> None:
    try:
        name = AdapterName.parse(text)
    except InvalidName as error:
        name, refusal = None, error.message
    else:
        refusal = ""
    if name is None:
        assert repr(text) in refusal
    else:
        assert str(name) in (text, f"default/{text}")
        assert not {"..", ""} & set(str(name).split("/"))


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "a/", "/a", "a/b/c", "A/b", "a/B", "a b", "../x", "a/..", ".a/b", "-a/b", "a\n",
        "a\0", "é/b", "a/" + "b" * 64, "a/b\n", "a%2fb", "a\\b", "~/b", "a/b@c",
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        AdapterName.parse(text)


@pytest.mark.parametrize(
    "tail", ["", "V1", "sha256:", "sha256:abc", "sha256:" + "a" * 65, "sha256:ABCDEF12", "a/b"]
)
def test_what_is_no_selector_is_refused(tail: str) -> None:
    with pytest.raises(InvalidName):
        Selector.parse(f"a/b@{tail}")


def test_a_name_alone_means_the_default_namespace_and_production() -> None:
    selector = Selector.parse("support")
    assert str(selector) == "default/support@production"


@pytest.mark.parametrize("alias", ["v7", "v0", "v" + "9" * 20])
def test_an_alias_cannot_look_like_a_version(alias: str) -> None:
    with pytest.raises(InvalidName, match="version number"):
        check_alias(alias)


@pytest.mark.parametrize("tail", ["sha256:", "sha256:ab12", "sha256:xyzxyzxyz"])
def test_what_is_meant_as_a_digest_is_refused_as_one(tail: str) -> None:
    with pytest.raises(InvalidName, match=r"is no digest: .* 8 to 64"):
        Selector.parse(f"a/b@{tail}")


@given(st.text(max_size=70))
def test_only_64_hex_digits_become_a_path(text: str) -> None:
    if re.fullmatch("[0-9a-f]{64}", text):
        assert blob_key(text) == f"{text[:2]}/{text}"
    else:
        with pytest.raises(IntegrityError):
            blob_key(text)


@pytest.mark.parametrize("text", ["0" * 64 + "\n", "../" + "0" * 61, "A" * 64, "٠" * 64])
def test_what_almost_is_a_digest_is_no_path(text: str) -> None:
    with pytest.raises(IntegrityError):
        blob_key(text)
