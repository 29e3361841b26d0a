"""What is not there is said with what to do about it, over HTTP and on the command line apart."""

import re

import pytest
from typer.testing import CliRunner

from tests.serving.live import CHAT, Running, Wardrobe
from wardrobe import app

ABSENT = {
    "/v1/models/acme/nothing": "GET /v1/models",
    "/v1/models/acme/support@v9": "GET /v1/adapters/",
    "/v1/models/acme/support@canary": "GET /v1/adapters/",
    "/v1/adapters/acme/nothing": "GET /v1/models",
    "/v1/adapters/acme/support/shadow": "/shadow",
    "/v1/endpoints/acme/nothing": "GET /v1/endpoints",
    "/v1/experiments/exp_0": "GET /v1/experiments",
    "/v1/layers/acme/nothing": "PUT /v1/layers/",
    "/v1/logs/nothing": "GET /v1/logs",
}


def test_a_404_says_what_to_do_over_http_and_names_no_command(live: Running) -> None:
    with live.client() as client:
        answers = {path: client.get(path) for path in ABSENT}
        answers["key"] = client.post("/v1/keys/0123456789ab/rotate", json={})
        answers["model"] = live.post(CHAT | {"model": "acme/nothing"})
    cures = {**ABSENT, "key": "GET /v1/keys", "model": "GET /v1/models"}
    for path, answer in answers.items():
        said = answer.json()["error"]["message"]
        assert answer.status_code == 404, path
        assert cures[path] in said, (path, said)
        assert not re.search(r"\bwardrobe [a-z]", said), (path, said)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("show", "acme/nothing"), "wardrobe list"),
        (("promote", "acme/support@v9", "--reason", "why"), "wardrobe show acme/support"),
        (("rollback", "acme/support", "--alias", "canary", "--reason", "why"), "wardrobe promote"),
        (("key", "revoke", "0123456789ab"), "wardrobe key list"),
        (("shadow", "report", "acme/support"), "wardrobe shadow start acme/support"),
        (("experiment", "status", "exp_0"), "wardrobe experiment list"),
    ],
)
def test_the_command_line_names_its_commands(
    wardrobe: Wardrobe, arguments: tuple[str, ...], command: str
) -> None:
    wardrobe.push(promote=False)
    result = CliRunner().invoke(app, [*arguments, "--home", str(wardrobe.registry.home)])
    assert (result.exit_code, command in result.stderr) == (2, True), result.output
