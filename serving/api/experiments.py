"""/v1/experiments and /v1/feedback: run A/B tests over HTTP, and say what came of an answer."""

import asyncio
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, get, post, put
from litestar.params import FromPath, FromQuery
from msgspec import Meta

from registry.adapter import AdapterName
from serving.api.adapters import decode_body, moving, own_adapter
from serving.api.auth import declare, everywhere
from serving.api.errors import RequestError
from serving.api.record import record_of
from serving.api.services import read_json, services_of
from serving.experiments.codec import no_experiment
from serving.experiments.design import (
    check_holdout,
    check_policy,
    layer_part,
    make_arms,
    make_metrics,
)
from serving.experiments.experiment import REMARKS, Experiment, Policy
from serving.experiments.feedback import FeedbackInvalid
from serving.experiments.layers import describe_layer, no_layer
from serving.experiments.moves import MAX_REASON, MOVES, move
from serving.experiments.page import write_page
from serving.experiments.power import estimate
from serving.experiments.ramps import MAX_STEPS, read_ramp
from serving.experiments.report import describe, summarize
from serving.experiments.store import Experiments
from serving.tenants.access import owns
from serving.tenants.keys import EXPERIMENTS, FEEDBACK

AnyRequest = Request[Any, Any, Any]
MAX_WORDS = 32_768  # characters of a comment, a demonstration, a message
MAX_MESSAGES = 64
Text = Annotated[str, Meta(min_length=1, max_length=300)]
Reason = Annotated[str, Meta(min_length=1, max_length=MAX_REASON)]


class NewExperiment(msgspec.Struct, forbid_unknown_fields=True):
    """What `wardrobe experiment create` takes."""

    treatments: Annotated[list[Text], Meta(min_length=1, max_length=7)]
    metric: Text
    guardrails: Annotated[list[Text], Meta(max_length=8)] = msgspec.field(
        default_factory=lambda: ["errors"]
    )
    signals: Annotated[list[Text], Meta(max_length=8)] = msgspec.field(default_factory=list)
    share: float = 0.5
    alpha: float = 0.05
    on_win: Literal["tell", "promote"] = "tell"
    blind: bool = False
    ramp: Annotated[list[Text], Meta(max_length=MAX_STEPS)] = msgspec.field(default_factory=list)
    least_effect: float | None = None
    max_units: int | None = None
    prices: tuple[float, float] | None = None
    layer: Text | None = None
    layer_share: float | None = None

    @property
    def policy(self) -> Policy:
        """Raises DesignInvalid."""
        return Policy(
            alpha=self.alpha,
            on_win=self.on_win,
            blind=self.blind,
            ramp=read_ramp(self.ramp),
            least_effect=self.least_effect,
            max_units=self.max_units,
            prices=self.prices,
        )

    @property
    def part(self) -> tuple[str, float] | None:
        """Raises DesignInvalid."""
        return layer_part(self.layer, self.layer_share)


class Move(msgspec.Struct, forbid_unknown_fields=True):
    """A change of a running experiment, and why."""

    reason: Reason
    exposure: float | None = None


class NewLayer(msgspec.Struct, forbid_unknown_fields=True):
    holdout: float = 0.0


class Said(msgspec.Struct, forbid_unknown_fields=True):
    """One message of what a demonstration answers."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Meta(max_length=MAX_WORDS)]


class Feedback(msgspec.Struct, forbid_unknown_fields=True):
    """What came of one answer: a number for a metric, or words."""

    request_id: Annotated[str, Meta(min_length=1, max_length=64)]
    metric: Annotated[str, Meta(min_length=1, max_length=63)]
    value: (
        Annotated[float, Meta(ge=-1e12, le=1e12)]
        | Annotated[str, Meta(min_length=1, max_length=MAX_WORDS)]
    )
    messages: Annotated[list[Said], Meta(max_length=MAX_MESSAGES)] = msgspec.field(
        default_factory=list
    )
    idempotency_key: Annotated[str, Meta(min_length=1, max_length=128)] | None = None


@post("/v1/adapters/{namespace:str}/{name:str}/experiments", opt=declare(EXPERIMENTS))
async def create_experiment(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str]
) -> dict[str, Any]:
    """Write down an experiment on the production traffic of an adapter."""
    services, actor = services_of(request.app), record_of(request.scope).tenant
    adapter = own_adapter(request, namespace, name)
    wanted = decode_body(await read_json(request), NewExperiment)

    def create() -> Experiment:
        arms = make_arms(services.registry, adapter, wanted.treatments, wanted.share)
        metrics = make_metrics(wanted.metric, wanted.guardrails, wanted.signals)
        check_policy(arms, metrics, adapter, wanted.policy)
        return services.store.create(
            adapter, arms, metrics, wanted.policy, layer=wanted.part, actor=actor
        )

    return summarize(await moving(create))


@get("/v1/experiments", opt=declare(EXPERIMENTS))
async def list_experiments(request: AnyRequest) -> dict[str, Any]:
    """Return the caller's experiments, oldest first."""
    principal = request.user
    namespace = None if principal.is_operator else principal.tenant
    found = await asyncio.to_thread(services_of(request.app).store.find, namespace=namespace)
    return {"object": "list", "data": [summarize(experiment) for experiment in found]}


@get("/v1/experiments/{experiment:str}", opt=declare(EXPERIMENTS))
async def get_experiment(request: AnyRequest, experiment: FromPath[str]) -> dict[str, Any]:
    """Return its numbers, what they say, and the log of decisions."""
    found = await _own(request, experiment)
    return await asyncio.to_thread(describe, services_of(request.app).store, found)


@post("/v1/experiments/{experiment:str}/{action:str}", opt=declare(EXPERIMENTS), status_code=200)
async def move_experiment(
    request: AnyRequest, experiment: FromPath[str], action: FromPath[str]
) -> dict[str, Any]:
    """Start, ramp, pause or stop."""
    if action not in MOVES:
        raise RequestError(
            f"{action[:40]!r} is no action; an experiment can start, ramp, pause and stop.",
            status=404,
        )
    found = await _own(request, experiment)
    wanted = decode_body(await read_json(request), Move)
    actor = record_of(request.scope).tenant
    store = services_of(request.app).store
    call = partial(
        move, store, found, action, exposure=wanted.exposure, actor=actor, reason=wanted.reason
    )
    return summarize(await moving(call))


@get(
    "/v1/experiments/{experiment:str}/report", opt=declare(EXPERIMENTS), media_type="text/markdown"
)
async def get_report(request: AnyRequest, experiment: FromPath[str]) -> str:
    """Return the same as a page of Markdown."""
    found = await _own(request, experiment)
    return write_page(await asyncio.to_thread(describe, services_of(request.app).store, found))


@get("/v1/experiments/{experiment:str}/power", opt=declare(EXPERIMENTS))
async def get_power(
    request: AnyRequest,
    experiment: FromPath[str],
    units_per_day: FromQuery[float | None] = None,
    effect: FromQuery[float | None] = None,
    baseline: FromQuery[float | None] = None,
    deviation: FromQuery[float | None] = None,
) -> dict[str, Any]:
    """Say before the start how many units an effect takes, and how many days."""
    found = estimate(
        await _own(request, experiment),
        units_per_day=units_per_day or 0.0,
        effect=effect,
        baseline=baseline,
        deviation=deviation,
    )
    return {"object": "power", **asdict(found), "sentence": found.sentence}


@put("/v1/layers/{namespace:str}/{name:str}", opt=declare(EXPERIMENTS), status_code=201)
async def create_layer(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str]
) -> dict[str, Any]:
    """Make a layer, whose experiments share no unit."""
    layer = _own_layer(request, namespace, name)
    holdout = check_holdout(decode_body(await read_json(request), NewLayer).holdout)
    store = services_of(request.app).store
    return describe_layer(await moving(lambda: store.add_layer(*layer, holdout)))


@get("/v1/layers/{namespace:str}/{name:str}", opt=declare(EXPERIMENTS))
async def get_layer(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str]
) -> dict[str, Any]:
    """Return who has which part of a layer, and what is free."""
    layer = _own_layer(request, namespace, name)
    return describe_layer(await asyncio.to_thread(services_of(request.app).store.layer, *layer))


@get("/v1/adapters/{namespace:str}/{name:str}/demonstrations", opt=declare(EXPERIMENTS))
async def get_demonstrations(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str], after: FromQuery[int] = 0
) -> dict[str, Any]:
    """Return the answers that people gave instead, as rows of a recipe; some at a time."""
    adapter = own_adapter(request, namespace, name)
    found = await asyncio.to_thread(services_of(request.app).store.demonstrations, adapter, after)
    last = found[-1].seq if found else None
    return {"object": "list", "data": [given.row() for given in found], "after": last}


@post(everywhere("/v1/feedback"), opt=declare(FEEDBACK), status_code=200)
async def give_feedback(request: AnyRequest) -> dict[str, Any]:
    """Say what came of an answer, however late. The last value counts; a known key is no news."""
    wanted = decode_body(await read_json(request), Feedback)
    principal = request.user
    tenant = None if principal.is_operator else principal.tenant
    store = services_of(request.app).store
    take = partial(_take, store, wanted, tenant, wanted.idempotency_key)
    recorded = await asyncio.to_thread(take)
    return {"object": "feedback", "request_id": wanted.request_id, "recorded": recorded}


def _take(store: Experiments, wanted: Feedback, tenant: str | None, key: str | None) -> bool:
    """Raises FeedbackInvalid for words where a number belongs, and the other way round."""
    words = wanted.metric in REMARKS
    if isinstance(wanted.value, str) != words:
        belongs = "a text" if words else "a number"
        raise FeedbackInvalid(f"The value of {wanted.metric!r} is {belongs}.")
    if isinstance(wanted.value, str):
        said = [msgspec.to_builtins(message) for message in wanted.messages]
        return store.give_words(
            wanted.request_id, wanted.metric, wanted.value, said, tenant=tenant, key=key
        )
    if wanted.messages:
        raise FeedbackInvalid("`messages` are for a demonstration only; they would not be kept.")
    return store.give_feedback(
        wanted.request_id, wanted.metric, wanted.value, tenant=tenant, key=key
    )


def _own_layer(request: AnyRequest, namespace: str, name: str) -> tuple[str, str]:
    layer = AdapterName.parse(f"{namespace}/{name}")
    if not owns(request.user, layer):
        raise no_layer(namespace, name)
    return layer.namespace, layer.name


async def _own(request: AnyRequest, experiment_id: str) -> Experiment:
    experiment = await asyncio.to_thread(services_of(request.app).store.get, experiment_id)
    if not owns(request.user, experiment.name):
        raise no_experiment(experiment_id)
    return experiment
