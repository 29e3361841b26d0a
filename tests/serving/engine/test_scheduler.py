"""Shares of a crowded engine, in simulated steps: no model, no clock, no thread."""

import random
from collections import Counter, defaultdict

import pytest

from benchmarks.workload import jain, percentile
from registry.adapter import AdapterRef
from serving.engine.boundary import GenerateRequest, Priority, SamplingParams
from serving.engine.fair_queue import CREDIT, OUTPUT_WEIGHT, PROMPT_WEIGHT
from serving.engine.scheduler import LOW_SHARE, SITS_OUT, STRETCH, Scheduler
from serving.engine.sequence import Row
from serving.engine.sequence import Sequence as Request

PLACES, PARKED, RIDGE = 16, 2, 16


class Steps:
    """A scheduler whose model answers at once: it counts steps and what each tenant got."""

    def __init__(self, *, by_tenant: bool = True) -> None:
        """Without `by_tenant` no request says whose it is: first come, first served."""
        self.scheduler = Scheduler(PLACES, PARKED, max_batched_tokens=512, ridge=RIDGE)
        self.by_tenant = by_tenant
        self.now = 0
        self.spent = 0  # how long the steps took, in tokens
        self.rows: list[Row] = []  # of the last step
        self.service: Counter[str] = Counter()  # weighted tokens, each counted once
        self.sent: dict[Request, int] = {}  # all that have not ended, and when they came
        self.spent_before: dict[Request, int] = {}
        self.owner: dict[Request, str] = {}
        self.alive: Counter[str] = Counter()
        self.first: dict[str, list[int]] = defaultdict(list)  # steps to the first token
        self.cost: dict[str, list[int]] = defaultdict(list)  # how long it took, in tokens
        self.paused = self.dropped = 0

    def send(
        self, tenant: str, prompt: int = 64, output: int = 32, priority: Priority = "normal"
    ) -> Request:
        named = tenant if self.by_tenant else ""
        params = SamplingParams(max_tokens=output)
        request = GenerateRequest("r", (1,) * prompt, params, tenant=named, priority=priority)
        sequence = Request(request)
        self.sent[sequence], self.owner[sequence] = self.now, tenant
        self.spent_before[sequence] = self.spent
        self.alive[tenant] += 1
        self.scheduler.add(sequence)
        return sequence

    def keep(self, tenant: str, count: int, prompt: int = 64, output: int = 32) -> None:
        """Fill up a tenant's requests that wait or run."""
        while self.alive[tenant] < count:
            self.send(tenant, prompt, output)

    def waits(self, tenant: str) -> list[int]:
        """Return steps to the first token; who has none yet has waited until now."""
        unanswered = [
            self.now - sent
            for request, sent in self.sent.items()
            if self.owner[request] == tenant and not request.produced
        ]
        return self.first[tenant] + unanswered

    def step(self) -> None:
        for move in self.scheduler.admit(lambda _: True):
            self.paused += move.pauses is not None
            self.dropped += move.drops is not None
            assert len(self.scheduler.running) <= PLACES
            assert len(self.scheduler.parked) <= PARKED
        self.rows = self.scheduler.schedule()
        self.now += 1
        self.spent += RIDGE + sum(row.count for row in self.rows)
        for row in self.rows:
            self._advance(row)

    def _advance(self, row: Row) -> None:
        sequence, tenant = row.sequence, self.owner[row.sequence]
        assert row.start == sequence.computed, "a token was skipped or read twice"
        prompt = row.new_prompt_tokens
        self.scheduler.charge(row, sampled=row.samples)
        sequence.advance(row)
        self.service[tenant] += PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * row.samples
        if not row.samples:
            return
        sequence.tokens.append(0)
        if sequence.produced == 1:
            self.first[tenant].append(self.now - self.sent[sequence])
            self.cost[tenant].append(self.spent - self.spent_before[sequence])
        if sequence.produced == sequence.sampling.max_tokens:
            self.scheduler.remove(sequence)
            del self.sent[sequence]
            self.alive[tenant] -= 1


def largest_gap(steps: Steps) -> int:
    """Return how far two tenants that never stop asking come apart; their requests differ."""
    largest = 0
    for _ in range(3000):
        steps.keep("few", 20, prompt=30, output=40)
        steps.keep("many", 200, prompt=200, output=10)
        steps.step()
        largest = max(largest, abs(steps.service["few"] - steps.service["many"]))
    return largest


# Theorem 4.4 of the paper: 2 max(w_p · longest prompt, w_q · tokens that fit into the batch).
BOUND = 2 * max(PROMPT_WEIGHT * 200, OUTPUT_WEIGHT * PLACES * 210)


def test_two_tenants_that_never_stop_asking_stay_within_the_bound() -> None:
    assert largest_gap(Steps()) <= BOUND


def test_first_come_first_served_breaks_that_bound() -> None:
    assert largest_gap(Steps(by_tenant=False)) > BOUND


def service_under_load(steps: Steps) -> float:
    """Return Jain's index when everybody asks for more than there is, one 100 times as much."""
    for _ in range(1200):
        for tenant in "abcd":
            steps.keep(tenant, 8)
        steps.keep("noisy", 800)
        steps.step()
    return jain([steps.service[tenant] for tenant in ("a", "b", "c", "d", "noisy")])


def test_a_tenant_that_asks_for_a_hundred_times_as_much_gets_no_more() -> None:
    assert service_under_load(Steps()) >= 0.95


def test_first_come_first_served_gives_it_nearly_everything() -> None:
    assert service_under_load(Steps(by_tenant=False)) < 0.5


def flood(steps: Steps, noisy: int, output: int) -> None:
    """Let four tenants send at random, each two fifths of its share, beside a noisy one.

    `noisy` requests of the fifth are always there.
    """
    rng = random.Random(7)
    for _ in range(2500):
        for tenant in "abcd":
            if rng.random() < 0.4 / 4 * PLACES / 36:
                steps.send(tenant)
        steps.keep("noisy", noisy, output=output)
        steps.step()


def others_p99(steps: Steps, noisy: int, output: int) -> float:
    """Return the 99th percentile of the others' steps to a first token, beside a noisy tenant."""
    flood(steps, noisy, output)
    waits = [wait for tenant in "abcd" for wait in steps.waits(tenant)]
    return percentile(waits, 99)


@pytest.mark.parametrize("output", [32, 1000])
def test_the_others_hardly_notice_a_noisy_tenant(output: int) -> None:
    assert others_p99(Steps(), 300, output) <= 2 * others_p99(Steps(), 3, output)


@pytest.mark.parametrize("output", [32, 1000])
def test_first_come_first_served_makes_the_others_wait(output: int) -> None:
    crowded, quiet = (others_p99(Steps(by_tenant=False), n, output) for n in (300, 3))
    assert crowded > 10 * quiet


def test_who_has_had_more_sits_out_while_a_prompt_of_somebody_else_is_read() -> None:
    steps = Steps()
    for _ in range(50):
        steps.keep("noisy", 40, output=1000)
        steps.step()
    late = steps.send("late")
    steps.step()
    assert late.produced == 1
    assert [row.sequence for row in steps.rows] == [late]
    steps.step()
    assert {row.sequence for row in steps.rows} == set(steps.scheduler.running)


def test_nobody_sits_out_for_what_is_no_tenants() -> None:
    """The check of a new adapter is not a first token that somebody waits for."""
    steps = Steps()
    steps.keep("noisy", 8, output=1000)
    for _ in range(50):
        steps.step()
    steps.send("", prompt=4)
    steps.step()
    assert len(steps.rows) == 9


def others_cost(sits_out: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Return the others' median time to a first token beside a flood, and all service a token."""
    monkeypatch.setattr("serving.engine.scheduler.SITS_OUT", sits_out)
    steps = Steps()
    flood(steps, 300, 32)
    costs = [cost for tenant in "abcd" for cost in steps.cost[tenant]]
    return percentile(costs, 50), sum(steps.service.values()) / steps.spent


def test_sitting_out_makes_first_tokens_come_sooner_and_costs_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sooner, served = others_cost(SITS_OUT, monkeypatch)
    without, served_without = others_cost(0, monkeypatch)
    assert sooner < 0.85 * without
    assert served > 0.95 * served_without


def test_a_step_in_which_some_sit_out_is_at_most_one_step_longer() -> None:
    steps, rng, longest = Steps(), random.Random(5), 0.0
    for _ in range(600):
        if rng.random() < 0.1:
            steps.send("late", prompt=300, output=4)
        steps.keep("noisy", 40)
        steps.step()
        out = [sequence for sequence in steps.scheduler.running if sequence.sat_out]
        decoding = sum(row.count == 1 for row in steps.rows)
        decoding += sum(sequence.remaining == 1 for sequence in out)
        if out and decoding:
            tokens = sum(row.count for row in steps.rows)
            longest = max(longest, (RIDGE + tokens) / (RIDGE + decoding))
    assert STRETCH < longest <= STRETCH + 1


def longest_rest() -> int:
    """Return how many steps a stream waits for a token beside newcomers without end."""
    steps = Steps()
    old = steps.send("old", output=1000)
    longest, since = 0, 0
    for _ in range(300):
        before = old.produced
        steps.send(f"newcomer {steps.now}", prompt=30, output=1)
        steps.step()
        since = 0 if old.produced > before else since + 1
        longest = max(longest, since)
    assert not steps.paused
    return longest


def test_nobody_sits_out_for_long_though_there_is_always_a_newcomer() -> None:
    assert longest_rest() == SITS_OUT


def test_without_that_bound_a_stream_would_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engine.scheduler.SITS_OUT", 1000)
    assert longest_rest() > 100


def saved_up() -> int:
    """Return what a tenant that slept gets more than one that did not, once both ask for all."""
    steps = Steps()
    steps.keep("late", 2)
    for _ in range(1000):
        steps.keep("early", 40)
        steps.step()
    before = steps.service.copy()
    for _ in range(500):
        steps.keep("early", 40)
        steps.keep("late", 40)
        steps.step()
    gained = steps.service - before
    return gained["late"] - gained["early"]


def test_a_tenant_that_slept_has_saved_up_no_more_than_a_little_credit() -> None:
    assert saved_up() <= CREDIT + BOUND // 10


def test_without_the_lift_it_would_get_everything_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.engine.fair_queue.CREDIT", 1 << 40)
    assert saved_up() > BOUND // 2


def test_two_tenants_take_each_other_s_places_only_once() -> None:
    """A place changes hands when somebody comes, not back and forth."""
    steps = Steps()
    for _ in range(200):
        steps.keep("a", 40, output=1000)
        if steps.now > 20:
            steps.keep("b", 40, output=1000)
        steps.step()
    assert 0 < steps.paused < PLACES


def test_low_requests_wait_for_normal_ones_and_cost_them_little() -> None:
    def waits(low: int) -> list[int]:
        steps, rng = Steps(), random.Random(3)
        for _ in range(low):
            steps.send("shadow", output=200, priority="low")
        for _ in range(600):
            if rng.random() < 0.3:
                steps.send("a")
            steps.step()
            normal = sum(r.count for r in steps.rows if r.sequence.request.priority == "normal")
            other = sum(r.count for r in steps.rows) - normal
            assert not normal or other <= max(1, normal // LOW_SHARE)
        return steps.waits("a")

    assert waits(50) == waits(0)


def test_a_low_request_that_was_paused_ends_with_all_its_tokens() -> None:
    steps = Steps()
    low = [steps.send("shadow", output=50, priority="low") for _ in range(PLACES)]
    for _ in range(10):
        steps.step()
    for _ in range(PLACES):
        steps.send("a", output=20)
    steps.step()
    assert steps.paused == PLACES
    while steps.sent:
        steps.step()
    assert [request.produced for request in low] == [50] * PLACES
    # Each token counts once, however often the pause made the model read it.
    assert steps.service["shadow"] == PLACES * (64 * PROMPT_WEIGHT + 50 * OUTPUT_WEIGHT)


def test_of_low_requests_the_newest_gives_its_place() -> None:
    """Not the one whose tenant runs most: its normal requests have nothing to do with it."""
    steps = Steps()
    for _ in range(PLACES - 2):
        steps.send("busy")
    old = steps.send("busy", priority="low")
    steps.step()
    new = steps.send("other", priority="low")
    steps.step()
    steps.send("a")
    steps.step()
    assert steps.paused == 1
    assert old in steps.scheduler.running
    assert new not in steps.scheduler.running


def test_prompts_make_a_step_no_more_than_three_times_as_long() -> None:
    steps = Steps()
    for _ in range(300):
        steps.keep("a", 3 * PLACES, prompt=400, output=50)
        steps.step()
        decoding = sum(row.count == 1 for row in steps.rows)
        tokens = sum(row.count for row in steps.rows)
        assert not decoding or RIDGE + tokens <= STRETCH * (RIDGE + decoding)


def alone_beside(decoding: int, prompt: int, share: float = 0.0, is_new: bool = False) -> list[int]:
    """Return in which parts a prompt is read beside sequences that decode, each in its adapter."""
    scheduler = Scheduler(PLACES, 0, max_batched_tokens=512, ridge=RIDGE)
    for i in range(decoding):
        ref = AdapterRef(f"{i % 4}", "")
        scheduler.add(Request(GenerateRequest("r", (1,), SamplingParams(max_tokens=100), ref)))
    late = Request(GenerateRequest("r", (1,) * prompt, SamplingParams()))
    late.is_new = is_new
    scheduler.add(late)
    for move in scheduler.admit(lambda _: True):
        move.starts.share = share
    parts: list[int] = []
    while late.unread:
        for row in scheduler.schedule():
            row.sequence.advance(row)
            if row.sequence is late:
                parts.append(row.count)
            else:
                row.sequence.tokens.append(0)
    return parts


def test_a_prompt_is_read_in_as_few_steps_as_may_be_and_in_even_parts() -> None:
    assert (STRETCH - 1) * (RIDGE + 8) == 48, "the most in one step"
    assert alone_beside(8, 48) == [48]
    assert alone_beside(8, 49) == [25, 24]
    assert alone_beside(8, 100) == [34, 33, 33]


def test_a_prompt_right_after_its_load_call_is_read_in_a_part_more_if_it_needs_several() -> None:
    assert alone_beside(8, 48, is_new=True) == [48]
    assert alone_beside(8, 49, is_new=True) == [17, 16, 16]
    assert alone_beside(8, 100, is_new=True) == [25, 25, 25, 25]
    assert alone_beside(8, 450, is_new=True) == [41] * 10 + [40], "not one more for each"
    assert alone_beside(0, 100, is_new=True) == [100], "nobody decodes"


def test_what_adapters_take_to_be_read_makes_room_for_prompts_once_each() -> None:
    """Four of an eighth of the base's size, worn by four or by eight: half as much again is read.

    Of four of a quarter each no more than that is counted.
    """
    for decoding in (4, 8):
        most = (STRETCH - 1) * (3 * RIDGE // 2 + decoding)
        for share in (0.125, 0.25):
            assert alone_beside(decoding, most, share=share) == [most]
            assert len(alone_beside(decoding, most + 1, share=share)) == 2


def test_nobody_waits_for_an_adapter_of_somebody_else() -> None:
    """Who is not ready is passed over, keeps its place in the line, and starts when it is."""
    scheduler = Scheduler(2, 0, max_batched_tokens=64, ridge=RIDGE)
    requests = [Request(GenerateRequest(str(i), (1,), SamplingParams())) for i in range(3)]
    for sequence in requests:
        scheduler.add(sequence)
    slow, second, third = requests
    assert [move.starts for move in scheduler.admit(lambda s: s is second)] == [second]
    assert scheduler.waiting == [slow, third]
    assert [move.starts for move in scheduler.admit(lambda _: True)] == [slow]


# Who gives memory for keys and values


def crowded() -> tuple[Scheduler, dict[str, Request]]:
    """Three of tenant a and two low ones; one of each is paused."""
    scheduler = Scheduler(8, 4, max_batched_tokens=64, ridge=16)
    classes: dict[str, Priority] = {f"normal-{i}": "normal" for i in (1, 2, 3)}
    classes |= {f"low-{i}": "low" for i in (1, 2)}
    made = {name: Request(asked("a", priority)) for name, priority in classes.items()}
    for sequence in made.values():
        scheduler.add(sequence)
    assert len(list(scheduler.admit(lambda _: True))) == 5
    for name in ("normal-2", "low-1"):
        assert scheduler.pause(made[name]) is None
    return scheduler, made


def asked(tenant: str, priority: Priority) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=9)
    return GenerateRequest("r", (1,), sampling, None, tenant=tenant, priority=priority)


def test_low_ones_give_before_normal_ones_and_paused_ones_before_those_that_run() -> None:
    scheduler, made = crowded()
    order = [made[name] for name in ("low-1", "low-2", "normal-2", "normal-3")]
    assert scheduler.givers(Request(asked("b", "normal"))) == order, "a still runs one then, as b"
    for sequence in (*order, made["normal-1"]):
        assert scheduler.last() is sequence
        scheduler.drop(sequence)
    assert not scheduler.running
    assert len(scheduler.waiting) == 5


def test_a_low_one_takes_nothing_of_normal_ones_while_anybody_runs() -> None:
    scheduler, made = crowded()
    low = Request(asked("b", "low"))
    assert scheduler.givers(low) == [made["low-1"]]
    for sequence in list(scheduler.running):
        scheduler.remove(sequence)
    assert scheduler.givers(low) == [made["low-1"], made["normal-2"]], "or it would wait for ever"
