"""A full fine-tune kept whole is never worn, and never answered by the base in its place."""

from serving.tokens import Tokens
from tests.registry.making import make_whole
from tests.serving.live import CHAT, NAME, Wardrobe, running


def test_a_whole_model_that_is_asked_is_refused_with_the_way_out(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    folder = make_whole(wardrobe.folder / "whole", wardrobe.base)
    version = wardrobe.registry.push(folder, NAME, actor="test").version
    with running(wardrobe, tokens) as live:
        for model in ("acme/support@v1", f"acme/support@sha256:{version.digest}"):
            answer = live.post(CHAT | {"model": model})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (422, "adapter_refused")
            assert "wardrobe extract acme/support@v1 --push" in error["message"]
