from serving.api.chat import messages_of
from serving.api.conversation import Message, TextPart
from serving.api.plan import seed_of_choice
from serving.api.schemas import ChatRequest
from serving.routing import Route


def said(
    *messages: Message, system_prompt: str = "be brief", examples: tuple[tuple[str, str], ...] = ()
) -> list[tuple[str, str]]:
    request = ChatRequest(model="m", messages=list(messages))
    route = Route("acme/support@v1", "0" * 64, system_prompt=system_prompt, examples=examples)
    return [(m.role, m.content) for m in messages_of(request, route)]


def test_a_version_s_system_prompt_comes_first_where_the_request_has_none() -> None:
    assert said(Message("user", "hi")) == [("system", "be brief"), ("user", "hi")]
    assert said(Message("user", "hi"), system_prompt="") == [("user", "hi")]


def test_a_request_s_own_system_prompt_wins_under_either_name() -> None:
    for role in ("system", "developer"):
        messages = (Message(role, "mine"), Message("user", "hi"))
        assert said(*messages) == [("system", "mine"), ("user", "hi")]


def test_a_version_s_examples_are_turns_between_the_system_text_and_the_messages() -> None:
    shots = (("lost card", "block_card"), ("PIN?", "change_pin"))
    turns = [
        ("user", "lost card"),
        ("assistant", "block_card"),
        ("user", "PIN?"),
        ("assistant", "change_pin"),
    ]
    assert said(Message("user", "hi"), examples=shots) == [
        ("system", "be brief"),
        *turns,
        ("user", "hi"),
    ]
    own = (Message("developer", "mine"), Message("user", "hi"))
    assert said(*own, examples=shots) == [("system", "mine"), *turns, ("user", "hi")]


def test_text_parts_are_one_text() -> None:
    parts = [TextPart("turn on "), TextPart("the lights")]
    assert said(Message("user", parts), system_prompt="") == [("user", "turn on the lights")]


def test_neighbouring_seeds_share_no_choices() -> None:
    seeds = [seed_of_choice(seed, choice) for seed in range(-50, 50) for choice in range(16)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
