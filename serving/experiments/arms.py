"""From an arm, pinned when it was chosen, to the route that runs it in this server."""

import asyncio
from collections.abc import Awaitable, Callable

from registry.adapter import Selector, Version
from registry.base import BaseModel
from registry.errors import BaseMismatch, IntegrityError
from registry.store import Registry
from serving.experiments.experiment import Arm
from serving.routing import Route

MakeReady = Callable[[Version], Awaitable[None]]


async def ready_route(
    arm: Arm, registry: Registry, base: BaseModel, make_ready: MakeReady
) -> Route:
    """Load and check an arm; return its route.

    Raises BaseMismatch for an arm of another base, IntegrityError, StoreUnavailable, and whatever
    keeps the version from being served.
    """
    if arm.name is None or arm.number is None:
        if arm.digest != base.fingerprint:
            raise BaseMismatch(f"The arm {arm.label} is another base model.")
        return Route(base.id, base.fingerprint)
    selector = Selector(arm.name, number=arm.number)
    version = await asyncio.to_thread(registry.resolve, selector)
    if version.digest != arm.digest:
        raise IntegrityError(f"{version.ref.label} is not what it was: {version.digest}.")
    if version.base_id != base.id:
        raise BaseMismatch(f"{version.ref.label} is for {version.base_id}.")
    await make_ready(version)
    return Route.to(version)
