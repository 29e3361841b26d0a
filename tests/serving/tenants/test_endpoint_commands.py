"""Wrong words on the command line of endpoints, limits and usage, and what is said to them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wardrobe import app

Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path) -> Refuse:
    def refuse(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments, "--home", str(tmp_path / "home")])
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        return result.stderr.replace("\n", " ")

    return refuse


def test_a_schema_that_cannot_be_used_is_said_by_its_file(refuse: Refuse, tmp_path: Path) -> None:
    create = ("endpoint", "create", "acme/chat", "--model", "base", "--schema")
    assert "absent.json cannot be read: " in refuse(*create, str(tmp_path / "absent.json"))
    assert "cannot be read: " in refuse(*create, str(tmp_path))
    (tmp_path / "words.json").write_text("no JSON")
    said = refuse(*create, str(tmp_path / "words.json"))
    assert "words.json is no JSON" in said
    assert "quotes" not in said


def test_a_change_of_an_endpoint_that_changes_nothing_is_refused(refuse: Refuse) -> None:
    assert "Nothing is changed" in refuse("endpoint", "set", "acme/chat", "--reason", "why")


def test_a_limit_of_a_tenant_that_nobody_is_names_those_there_are(
    refuse: Refuse, tmp_path: Path
) -> None:
    home = ["--home", str(tmp_path / "home")]
    typo = ("limit", "set", "acmee", "--requests", "3")
    assert "here: nobody." in refuse(*typo)
    assert CliRunner().invoke(app, ["key", "create", "acme", *home]).exit_code == 0
    assert "There is no tenant 'acmee'. Did you mean acme?" in refuse(*typo)
    assert "here: acme." in refuse("limit", "set", "zzz", "--requests", "3")
    for tenant in ("acme", "*", "operator"):
        set_it = ["limit", "set", tenant, "--requests", "3", *home]
        assert CliRunner().invoke(app, set_it).exit_code == 0


def test_usage_of_a_time_that_ends_before_it_begins_is_refused(refuse: Refuse) -> None:
    span = ("--from", "2026-11-26", "--to", "2026-11-20T05")
    assert "from 2026-11-26 to 2026-11-20T05 ends before it begins" in refuse("usage", *span)


@pytest.mark.parametrize("last", ["2026-11-26", "2026-11-26T13", "2026-11"])
def test_usage_of_a_time_within_itself_is_no_contradiction(tmp_path: Path, last: str) -> None:
    span = ["usage", "--from", "2026-11-26T13", "--to", last, "--home", str(tmp_path)]
    assert CliRunner().invoke(app, span).exit_code == 0
