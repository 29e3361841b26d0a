"""/v1/experiments and /v1/feedback: run A/B tests over HTTP, and say what came of an answer."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from litestar import Request, get, post
from litestar.params import FromPath
from msgspec import Meta

from registry.errors import Conflict
from serving.api.adapters import decode_body, own_adapter
from serving.api.auth import declare, everywhere
from serving.api.errors import RequestError
from serving.api.record import record_of
from serving.api.services import read_json, services_of
from serving.experiments.design import check_policy, make_arms, make_metrics
from serving.experiments.experiment import Experiment
from serving.experiments.moves import move
from serving.experiments.report import describe, summarize
from serving.experiments.store import no_experiment
from serving.tenants.access import owns
from serving.tenants.keys import EXPERIMENTS, FEEDBACK

AnyRequest = Request[Any, Any, Any]
T = TypeVar("T")
Text = Annotated[str, Meta(min_length=1, max_length=300)]
Reason = Annotated[str, Meta(min_length=1, max_length=2000)]


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


class Move(msgspec.Struct, forbid_unknown_fields=True):
    """A change of a running experiment, and why."""

    reason: Reason
    exposure: float | None = None


class Feedback(msgspec.Struct, forbid_unknown_fields=True):
    """What came of one answer."""

    request_id: Annotated[str, Meta(min_length=1, max_length=64)]
    metric: Annotated[str, Meta(min_length=1, max_length=63)]
    value: Annotated[float, Meta(ge=-1e12, le=1e12)]
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
        check_policy(arms, adapter, wanted.alpha, wanted.on_win)
        metrics = make_metrics(wanted.metric, wanted.guardrails, wanted.signals)
        return services.store.create(
            adapter,
            arms,
            metrics,
            alpha=wanted.alpha,
            on_win=wanted.on_win,
            blind=wanted.blind,
            actor=actor,
        )

    return summarize(await _moving(create))


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
    if action not in ("start", "ramp", "pause", "stop"):
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
    return summarize(await _moving(call))


@post(everywhere("/v1/feedback"), opt=declare(FEEDBACK), status_code=200)
async def give_feedback(request: AnyRequest) -> dict[str, Any]:
    """Say what came of an answer, however late. The last value counts; a known key is no news."""
    wanted = decode_body(await read_json(request), Feedback)
    principal = request.user
    recorded = await asyncio.to_thread(
        services_of(request.app).store.give_feedback,
        wanted.request_id,
        wanted.metric,
        wanted.value,
        tenant=None if principal.is_operator else principal.tenant,
        key=wanted.idempotency_key,
    )
    return {"object": "feedback", "request_id": wanted.request_id, "recorded": recorded}


async def _own(request: AnyRequest, experiment_id: str) -> Experiment:
    experiment = await asyncio.to_thread(services_of(request.app).store.get, experiment_id)
    if not owns(request.user, experiment.name):
        raise no_experiment(experiment_id)
    return experiment


async def _moving(call: Callable[[], Experiment]) -> Experiment:
    try:
        return await asyncio.to_thread(call)
    except Conflict as error:
        raise RequestError(error.message, code=error.code, status=409) from error
