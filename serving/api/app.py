"""Builds the HTTP application from its parts."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from litestar import Litestar

from registry.base import BaseModel
from registry.store import Registry
from serving.api.adapters import get_adapter, get_history, promote, rollback
from serving.api.auth import Authentication, check_declared
from serving.api.chat import chat_completions
from serving.api.completions import completions
from serving.api.door import Door
from serving.api.drain import Drain
from serving.api.endpoints import (
    change_endpoint,
    create_endpoint,
    delete_endpoint,
    get_endpoint,
    list_endpoints,
)
from serving.api.errors import respond_with_error
from serving.api.experiments import (
    create_experiment,
    create_layer,
    get_demonstrations,
    get_experiment,
    get_layer,
    get_power,
    get_report,
    give_feedback,
    list_experiments,
    move_experiment,
)
from serving.api.guard import Guard
from serving.api.health import live, metrics, ready
from serving.api.keys import (
    create_key,
    get_one_tenant,
    get_tenants,
    list_keys,
    revoke,
    rotate,
)
from serving.api.limits import clear_limit, get_limits, list_limits, set_limit
from serving.api.lora import load_lora_adapter, unload_lora_adapter
from serving.api.metrics import Metrics
from serving.api.models import get_model, list_models
from serving.api.push import push_version
from serving.api.request_log import get_log, list_logs
from serving.api.services import Services
from serving.api.settings import ServerSettings
from serving.api.shadows import get_shadow, list_shadows, start_shadow, stop_shadow
from serving.api.usage import get_usage
from serving.endpoint_follower import EndpointFollower
from serving.endpoints import LiveEndpoints
from serving.engine.boundary import Engine
from serving.experiments.live import LiveExperiments
from serving.experiments.recorder import Recorder
from serving.experiments.store import Experiments
from serving.experiments.webhook import Deliveries, Webhook
from serving.follower import Follower
from serving.loaded import LoadedAdapters
from serving.logs.store import Logs
from serving.logs.writer import LogWriter
from serving.routing import LiveTable, Router
from serving.selfcheck import make_ready
from serving.shadow.live import LiveShadows
from serving.shadow.mirror import Mirror
from serving.shadow.store import Comparisons
from serving.tenants.access import Access
from serving.tenants.keys import KeyRing
from serving.tenants.ledger import Ledger
from serving.tenants.meter import Meter
from serving.tokens import Tokens

HANDLERS = (
    list_models,
    get_model,
    chat_completions,
    completions,
    push_version,
    get_adapter,
    get_history,
    promote,
    rollback,
    create_experiment,
    list_experiments,
    get_experiment,
    get_report,
    get_power,
    move_experiment,
    create_layer,
    get_layer,
    get_demonstrations,
    give_feedback,
    list_limits,
    get_limits,
    set_limit,
    clear_limit,
    get_usage,
    create_endpoint,
    list_endpoints,
    get_endpoint,
    change_endpoint,
    delete_endpoint,
    create_key,
    list_keys,
    rotate,
    revoke,
    get_tenants,
    get_one_tenant,
    load_lora_adapter,
    unload_lora_adapter,
    start_shadow,
    stop_shadow,
    get_shadow,
    list_shadows,
    list_logs,
    get_log,
    live,
    ready,
    metrics,
)


def create_app(
    settings: ServerSettings, registry: Registry, engine: Engine, base: BaseModel, tokens: Tokens
) -> Litestar:
    """Return the application. Its lifespan follows the registry and, at the end, closes the engine.

    Raises UndeclaredRoute when a route does not say who may call it.
    """
    table, access = LiveTable(), Access(registry)
    ready = partial(make_ready, engine, tokens)
    endpoints, loaded = LiveEndpoints(), LoadedAdapters(engine, partial(ready, keep=True))
    router = Router(registry, base, table, access, endpoints, loaded)
    store, logs, counts = Experiments(registry.home), Logs(registry.home), Metrics()
    comparisons = Comparisons(registry.home)
    shadows = LiveShadows(comparisons, registry, base, ready, counts.shadowed)
    services = Services(
        settings=settings,
        registry=registry,
        engine=engine,
        base=base,
        tokens=tokens,
        router=router,
        access=access,
        live=table,
        endpoints=endpoints,
        loaded=loaded,
        store=store,
        experiments=LiveExperiments(store, registry, base, ready),
        recorder=Recorder(store),
        logs=logs,
        log_writer=LogWriter(logs, counts.log_dropped),
        comparisons=comparisons,
        shadows=shadows,
        mirror=Mirror(shadows, engine, tokens),
        drain=Drain(),
        metrics=counts,
        authentication=Authentication(KeyRing(registry) if settings.auth else None),
        meter=Meter(Ledger(registry.home), settings.server_id),
    )
    app = Litestar(
        route_handlers=HANDLERS,
        guards=[services.authentication.authorize],
        exception_handlers={Exception: respond_with_error},
        lifespan=[_lifespan(services)],
        openapi_config=None,  # the schema would be one more route to guard
        logging_config=None,  # the composition root configures logging
        request_max_body_size=None,  # the guard counts
        debug=False,
    )
    app.state.services = services
    check_declared(app)
    # Around Litestar's own routing, so that its 404 and 405 pass through the guard as well.
    app.asgi_handler = Guard(
        app.asgi_handler, settings, Door(engine), services.drain, counts, services.log_writer
    )
    return app


def _lifespan(services: Services) -> Callable[[Litestar], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncGenerator[None]:
        ready = partial(make_ready, services.engine, services.tokens)
        follower = Follower(
            services.registry,
            services.engine,
            services.tokens,
            services.base,
            services.live,
            EndpointFollower(services.registry, services.router, ready, services.endpoints),
            server_id=services.settings.server_id,
            url=services.settings.url,
        )
        webhook = services.settings.webhook
        deliveries = _deliveries(services, webhook) if webhook else None
        services.recorder.start()
        await asyncio.to_thread(services.meter.join)
        services.meter.start()
        services.log_writer.start()
        await follower.start()
        await services.experiments.start()
        await services.shadows.start()
        if deliveries is not None:
            deliveries.start()
        try:
            yield
        finally:
            await services.mirror.stop()
            await services.shadows.stop()
            if deliveries is not None:
                await deliveries.stop()
            await services.experiments.stop()
            await follower.stop()
            await asyncio.to_thread(services.recorder.stop)
            await asyncio.to_thread(services.meter.stop)
            await asyncio.to_thread(services.log_writer.stop)
            services.store.close()
            services.logs.close()
            services.comparisons.close()
            await services.engine.aclose()

    return lifespan


def _deliveries(services: Services, webhook: Webhook) -> Deliveries:
    counter = services.metrics.webhook
    return Deliveries(services.store.outbox, webhook, lambda result: counter.labels(result).inc())
