"""What people say of answers on a running server, in values and in words."""

import httpx

from serving.tenants.keys import SCOPES, add_key
from tests.serving.experiments.trial import DESIGN, PATH, ask, start
from tests.serving.live import NAME, Running, Wardrobe, eventually


def test_feedback_reaches_the_arm_and_only_the_owner_gives_it(
    client: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    experiment = start(client)
    request_id = ask(client, "ann").headers["x-request-id"]
    body = {"request_id": request_id, "metric": "solved", "value": 1, "idempotency_key": "k"}
    assert client.post("/v1/feedback", json=body).json()["recorded"] is True
    assert client.post("/v1/feedback", json=body).json()["recorded"] is False
    wrong = client.post("/v1/feedback", json=body | {"value": 3, "idempotency_key": "l"})
    assert wrong.status_code == 400
    beta = {"authorization": f"Bearer {add_key(wardrobe.registry, 'beta', SCOPES)}"}
    with httpx.Client(base_url=live.url, headers=beta) as other:
        answer = other.post("/v1/feedback", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, None)
        assert other.get(f"/v1/experiments/{experiment}").status_code == 404
        assert other.get("/v1/experiments").json()["data"] == []
        assert (
            other.post(f"/v1/experiments/{experiment}/stop", json={"reason": "x"}).status_code
            == 404
        )
        assert other.post(PATH, json=DESIGN).status_code == 404
    facts = client.get(f"/v1/experiments/{experiment}").json()
    solved = next(m for m in facts["metrics"] if m["metric"] == "solved")
    assert solved["control"] + solved["treated"] > 0


def test_people_say_it_in_words_and_their_answers_become_rows(
    client: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    experiment = start(client)
    request_id = ask(client, "ann").headers["x-request-id"]
    said = {"request_id": request_id, "metric": "comment", "value": "too | short"}
    assert client.post("/v1/feedback", json=said).json()["recorded"] is True
    shown = {
        "request_id": request_id,
        "metric": "demonstration",
        "value": "the right answer",
        "messages": [{"role": "user", "content": "hello"}],
        "idempotency_key": "k",
    }
    assert client.post("/v1/feedback", json=shown).json()["recorded"] is True
    assert client.post("/v1/feedback", json=shown).json()["recorded"] is False
    for wrong in (
        said | {"value": 1},
        said | {"metric": "solved"},
        shown | {"messages": []},
        shown | {"messages": [{"role": "assistant", "content": "hello"}]},
        said | {"messages": shown["messages"]},
        shown | {"metric": "solved", "value": 1},
    ):
        assert client.post("/v1/feedback", json=wrong).status_code == 400, wrong
    beta = {"authorization": f"Bearer {add_key(wardrobe.registry, 'beta', SCOPES)}"}
    assert client.post("/v1/feedback", json=said, headers=beta).status_code == 404
    wardrobe.registry.share(NAME, "beta")
    eventually(lambda: "x-arm" in ask(client, "ann", headers=beta).headers)
    theirs = ask(client, "ann", headers=beta).headers["x-request-id"]
    for words in (said, shown):
        refused = client.post("/v1/feedback", json=words | {"request_id": theirs}, headers=beta)
        assert (refused.status_code, "read by acme" in refused.text) == (400, True)
    path = "/v1/adapters/acme/support/demonstrations"
    assert client.get(path, headers=beta).status_code == 404
    page = client.get(path).json()
    (row,) = page["data"]
    assert client.get(path, params={"after": page["after"]}).json()["data"] == []
    assert row["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "the right answer"},
    ]
    assert row["made"]["request_id"] == request_id
    page = client.get(f"/v1/experiments/{experiment}/report")
    assert page.headers["content-type"] == "text/markdown; charset=utf-8"
    assert "too \\| short" in page.text
    assert "the right answer" not in page.text
