"""Where production's requests meet their shadow: looked on, and never held up."""

import logging
import secrets
from dataclasses import replace

from serving.api.plan import Plan
from serving.api.record import RequestRecord
from serving.api.services import Services
from serving.shadow.mirror import PromptFor

log = logging.getLogger("wardrobe.shadow")


async def mirror(
    services: Services, record: RequestRecord, plan: Plan, prompt_for: PromptFor
) -> Plan:
    """Return the plan of a request, which is mirrored if it was chosen to be.

    A request without a seed gets one, so that both answers are drawn with the same numbers.
    """
    if record.shadow is None:
        return plan
    try:
        return await _mirror(services, record, plan, prompt_for)
    except Exception:  # whatever a shadow meets, production answers
        log.exception("mirroring %s failed", record.request_id)
        return plan


async def _mirror(
    services: Services, record: RequestRecord, plan: Plan, prompt_for: PromptFor
) -> Plan:
    assert record.shadow is not None, "only chosen requests are mirrored"
    first, *others = plan.requests
    if first.sampling.seed is None and first.sampling.temperature > 0:
        first = replace(first, sampling=replace(first.sampling, seed=secrets.randbits(63)))
    grammar_kind = first.sampling.grammar and first.sampling.grammar.kind
    begun = await services.mirror.begin(
        record.shadow, first, plan.stops, prompt_for, json_asked=grammar_kind == "json"
    )
    if begun is None:
        return plan
    watch, task = begun
    record.watchers.append(watch.see)

    def ended(record: RequestRecord) -> None:
        if record.outcome or record.status >= 400 or not watch.side.done():
            task.cancel()

    record.on_end.append(ended)
    return replace(plan, requests=(first, *others))
