"""From a decoded request to the version that answers it: resolved, assigned, and written down."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from litestar import Request

from registry.errors import IntegrityError, StoreUnavailable
from serving.api.errors import RequestError
from serving.api.plan import Plan
from serving.api.record import RequestRecord, record_of
from serving.api.request_log import keep_what_is_said
from serving.api.schemas import DefaultsOf, SamplingFields
from serving.api.sequence import Piece
from serving.api.services import Services, services_of
from serving.experiments.answers import Exposure, Outcome
from serving.experiments.experiment import unit_of
from serving.experiments.formats import Format
from serving.experiments.recorder import Recorder
from serving.routing import Route

UNIT_HEADER = "x-unit-key"
MAX_UNIT_CHARACTERS = 512
NOT_THE_ARMS_FAULT = (429, 499)  # too many requests, and a client that went


def defaults_of(request: Request[Any, Any, Any]) -> DefaultsOf:
    """Return what tells the defaults of a model for this caller; none where it is no endpoint."""
    endpoints, caller = services_of(request.app).endpoints, request.user

    def find(model: str) -> Mapping[str, Any]:
        endpoint = endpoints.of(model, caller)
        return endpoint.defaults if endpoint else {}

    return find


async def admit(request: Request[Any, Any, Any], fields: SamplingFields) -> Route:
    """Return what answers this request. An exposure is durable before this returns.

    Raises LimitReached before anything is done for a caller that has had its requests.
    """
    services, record = services_of(request.app), record_of(request.scope)
    route = await services.router.resolve(fields.model, request.user)
    record.lease = services.meter.lease(record.tenant, route.name)
    record.lease.enter()
    name = route.production_of
    if name is not None:
        key = _unit_key(request, fields)
        # Of two tenants, each has its own user 17.
        whose = f"{record.tenant}\x1f{key or record.request_id}"
        route = await _take_part(services, route, whose, record, keyed=key is not None)
        record.shadow = services.shadows.choose(name, route.fingerprint, whose)
    record.label, record.digest = route.label, route.fingerprint
    record.endpoint = str(route.endpoint.name) if route.endpoint else ""
    keep_what_is_said(services, record, fields)
    return route


def reserve(record: RequestRecord, plan: Plan) -> None:
    """Reserve the most tokens this can use. Raises LimitReached and NeverFits."""
    assert record.lease is not None, "admit comes first"
    answer = sum(request.sampling.max_tokens for request in plan.requests)
    record.lease.reserve(plan.prompt_tokens, answer)


async def _take_part(
    services: Services, route: Route, whose: str, record: RequestRecord, *, keyed: bool
) -> Route:
    """Return the route of the unit's arm, or the given one for a unit that is not exposed."""
    assert route.production_of is not None, "only production is split"
    running = services.experiments.of(route.production_of, whose)
    if running is None or running.routes[0].fingerprint != route.fingerprint:
        return route  # production was moved, perhaps away from what is broken: no arm holds it up
    experiment = running.experiment
    unit = unit_of(experiment.salt, whose)
    arm = experiment.assign(unit)
    if arm is None:
        return route
    row = Exposure(record.request_id, experiment.id, arm, unit, record.tenant, keyed)
    try:
        await services.recorder.expose(row)
    except (StoreUnavailable, IntegrityError):
        services.metrics.exposures.labels("no").inc()
        return route  # production answers, and nobody is counted: not a silent arm
    services.metrics.exposures.labels("yes").inc()
    judged = Format() if experiment.judges_format else None
    if judged is not None:
        record.watchers.append(partial(_watch, judged))
    record.on_end.append(partial(_end, services.recorder, judged))
    record.experiment, record.arm = experiment.id, str(arm)
    blind = experiment.policy.blind
    label = "" if blind else experiment.arms[arm].label
    taken = replace(running.routes[arm], experiment=experiment.id, arm=label, blind=blind)
    return taken.behind(route.endpoint)


def _watch(judged: Format, piece: Piece) -> None:
    judged.watch(piece.index, piece.text, ended=piece.finish_reason is not None)


def _end(recorder: Recorder, judged: Format | None, record: RequestRecord) -> None:
    failed = record.status >= 400 or record.outcome not in ("", "disconnect")
    if record.status in NOT_THE_ARMS_FAULT:
        failed = False
    recorder.end(
        Outcome(
            record.request_id,
            failed,
            record.seconds,
            record.completion_tokens,
            record.prompt_tokens,
            judged is not None and judged.malformed,
        )
    )


def _unit_key(request: Request[Any, Any, Any], fields: SamplingFields) -> str | None:
    """Return who this answer is for: what varies independently of everybody else."""
    header = request.headers.get(UNIT_HEADER)
    if header is not None and not 0 < len(header) <= MAX_UNIT_CHARACTERS:
        raise RequestError(
            f"{UNIT_HEADER} has {len(header)} characters; it takes 1 to {MAX_UNIT_CHARACTERS}."
        )
    return header or fields.safety_identifier or fields.user or None
