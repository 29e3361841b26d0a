"""The command line: the composition root, the only module that may import all three packages."""

from registry.interrupt import INTERRUPTED, leaving_when_interrupted, said_interrupted

with leaving_when_interrupted():
    import gc
    import logging
    import os
    from typing import TYPE_CHECKING, Annotated, Literal

    import typer
    from rich.console import Console

    from registry import commands as registry_commands
    from registry.commands import Home, clear_errors, open_registry
    from registry.errors import WardrobeError
    from serving.engine.memory import parse_memory
    from serving.experiments.commands import app as experiment_app
    from serving.experiments.looks import from_feedback
    from serving.logs.commands import app as logs_app
    from serving.shadow.commands import app as shadow_app
    from serving.shadow.commands import replay
    from serving.tenants.commands import app as tenants_app
    from serving.tenants.commands import key_app, tenant_app
    from serving.tenants.endpoint_commands import app as endpoint_app
    from serving.tenants.limit_commands import app as usage_app
    from serving.tenants.limit_commands import limit_app
    from training.commands import app as training_app
    from training.commands import data as training_data
    from training.commands.bases import DEFAULT_BASE, find_base

    if TYPE_CHECKING:
        from serving.offline import OfflineEngines

# torch, transformers and litestar are imported where a command needs them, so that `wardrobe list`
# answers at once.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="One frozen base model, a wardrobe of adapters: train, version, serve, hot-swap.",
)
training_data.app.command("from-feedback")(clear_errors()(from_feedback))
app.add_typer(training_app)
app.add_typer(registry_commands.app)
app.add_typer(tenants_app)
app.add_typer(tenant_app, name="tenant")
app.add_typer(key_app, name="key")
app.add_typer(limit_app, name="limit")
app.add_typer(usage_app)
app.add_typer(endpoint_app, name="endpoint")
app.add_typer(experiment_app, name="experiment")
app.add_typer(logs_app, name="logs")
app.add_typer(shadow_app, name="shadow")
app.command("replay")(replay)

out = Console(soft_wrap=True)


@app.callback()
def compose(context: typer.Context) -> None:
    context.obj = offline_engines


def offline_engines() -> "OfflineEngines":
    """Make what training asks: the engine that serves, without a server."""
    from serving.offline import OfflineEngines

    return OfflineEngines()


def memory(text: str) -> int:
    """Return the bytes of an option; click would say of a ValueError only that there was one."""
    try:
        return parse_memory(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
@clear_errors()
def serve(
    base: Annotated[
        str, typer.Option(help="Base model; pulled when it is not here.")
    ] = DEFAULT_BASE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU where there is one.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="auto takes bfloat16 where the hardware has it."),
    ] = "auto",
    operators: Annotated[
        Literal["auto", "torch"],
        typer.Option(
            envvar="WARDROBE_OPERATORS",
            help="auto compiles the CPU's forward pass on first use; torch never does.",
        ),
    ] = "auto",
    auth: Annotated[
        bool, typer.Option("--auth/--no-auth", help="--no-auth only works on loopback.")
    ] = True,
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="HOST[=TENANT]",
            help="A name to answer to, and whose it is; *.example.com: the label. Default: any.",
        ),
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Sequences in one batch.")] = 32,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="More of one tenant that may wait; then 429.")
    ] = 128,
    max_model_len: Annotated[
        int | None, typer.Option(min=16, help="Tokens of prompt and answer together.")
    ] = None,
    max_batched_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of one step: prompts go in chunks of it.")
    ] = 512,
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(
            parser=memory,
            metavar="SIZE",
            help="For keys and values of what runs, such as 8GiB. Default: half of what the "
            "weights leave.",
        ),
    ] = None,
    prefix_cache_memory: Annotated[
        int | None,
        typer.Option(
            parser=memory,
            metavar="SIZE",
            help="For what prompts begin with, such as 2GiB; 0: none. Default: an eighth of what "
            "the weights leave.",
        ),
    ] = None,
    adapter_memory: Annotated[
        int | None,
        typer.Option(
            parser=memory,
            metavar="SIZE",
            help="Of the device, for adapters that can be worn. Default: an eighth of what the "
            "weights leave.",
        ),
    ] = None,
    adapter_host_memory: Annotated[
        int | None,
        typer.Option(
            parser=memory,
            metavar="SIZE",
            help="Of the host, for adapters ready to go to the device. Default: an eighth of all; "
            "on the CPU none.",
        ),
    ] = None,
    adapter_slots: Annotated[
        int | None, typer.Option(min=1, help="Adapters that can be worn, if memory holds more.")
    ] = None,
    max_lora_rank: Annotated[int, typer.Option(min=1, max=256, help="Highest rank.")] = 256,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine.")] = None,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds for running streams after SIGTERM.")
    ] = 30.0,
    webhook: Annotated[
        str | None, typer.Option(metavar="URL", help="Is told the decisions of experiments.")
    ] = None,
    webhook_secret: Annotated[
        str,
        typer.Option(
            envvar="WARDROBE_WEBHOOK_SECRET",
            help="Signs what the webhook gets, whsec_…; best in the environment.",
        ),
    ] = "",
    home: Home = None,
) -> None:
    """Serve the base and every adapter of the registry over HTTP."""
    # A thread of torch's that waits for work keeps its core for milliseconds unless it is told
    # otherwise before torch is imported; the event loop, or the load of an adapter, needs it now.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from serving.api.files import raise_file_limit
    from serving.api.hosts import AllowedHost
    from serving.api.listener import listen
    from serving.api.settings import ServerSettings
    from serving.engine.settings import EngineSettings
    from serving.experiments.webhook import Webhook

    raise_file_limit()
    settings = ServerSettings(
        host=host,
        port=port,
        auth=auth,
        hosts=tuple(map(AllowedHost.parse, hosts or [])),
        drain_timeout=drain_timeout,
        webhook=Webhook.parse(webhook, webhook_secret) if webhook else None,
    )
    try:
        engine_settings = EngineSettings(
            device=device,
            dtype=dtype,
            operators=operators,
            max_running=max_running,
            max_waiting=max_waiting,
            max_model_len=max_model_len,
            max_batched_tokens=max_batched_tokens,
            kv_cache_bytes=kv_cache_memory,
            prefix_cache_bytes=prefix_cache_memory,
            adapter_memory=adapter_memory,
            adapter_host_memory=adapter_host_memory,
            adapter_slots=adapter_slots,
            max_lora_rank=max_lora_rank,
            threads=threads,
        )
    except ValueError as error:  # two options that contradict each other
        raise WardrobeError(str(error)) from error
    with listen(settings) as listener:  # before the model: a port that is taken is said at once
        from serving.api.server import serve as serve_http
        from serving.engine.engine import TorchEngine
        from serving.tenants.keys import ensure_operator_key
        from serving.tenants.redact import RedactingFormatter
        from serving.tokens import Tokens

        handler = logging.StreamHandler()
        handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        model = find_base(base)
        with open_registry(home) as registry:
            if auth and (key := ensure_operator_key(registry)):
                out.print(f"operator key, shown only now: [bold]{key}[/]", highlight=False)
            engine = TorchEngine.create(model, registry.find_files, engine_settings)
            serve_http(
                listener,
                settings,
                registry,
                engine,
                model,
                Tokens(model.path),
                on_start=lambda url: out.print(f"serving {model.id} at [bold]{url}[/]"),
            )


def main() -> None:
    """Run a command. Ctrl-C ends it with one word, as it does while it is imported."""
    try:
        app()
    except KeyboardInterrupt:  # while typer puts the commands together
        raise SystemExit(said_interrupted()) from None
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # typer's, of the same in a command
            said_interrupted()
        raise
    finally:
        gc.freeze()  # or the interpreter would look through all of torch's objects, for seconds


if __name__ == "__main__":
    main()
