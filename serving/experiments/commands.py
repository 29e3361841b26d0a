"""The commands that change experiments: create, start, ramp, pause, stop, and layers."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from registry.adapter import AdapterName
from registry.commands import Home, Json, actor, clear_errors, open_registry
from registry.screen import print_json
from serving.experiments.design import (
    check_holdout,
    check_policy,
    layer_part,
    make_arms,
    make_metrics,
    read_prices,
)
from serving.experiments.experiment import BUILT_IN, Policy
from serving.experiments.layers import describe_layer
from serving.experiments.looks import Id, open_experiments
from serving.experiments.looks import app as looks
from serving.experiments.moves import move
from serving.experiments.ramps import read_ramp
from serving.experiments.report import summarize

app = typer.Typer(no_args_is_help=True, help="A/B tests between versions, on live traffic.")
layer_app = typer.Typer(no_args_is_help=True, help="Experiments that share no unit, and a holdout.")

Reason = Annotated[str, typer.Option("--reason", help="Why; it stays in the log.")]
METRIC = f"NAME:KIND[:lower], KIND one of binary, total, average; or {', '.join(BUILT_IN)}."


@app.command("create")
@clear_errors()
def create(
    name: Annotated[str, typer.Argument(help="NAMESPACE/NAME whose production is split.")],
    treatments: Annotated[
        list[str], typer.Option("--treatment", help="@vN, a selector, or base; may be repeated.")
    ],
    metric: Annotated[str, typer.Option("--metric", help=f"What decides. {METRIC}")],
    guardrails: Annotated[
        list[str] | None,
        typer.Option("--guardrail", help="What must not get worse. Default: errors."),
    ] = None,
    signals: Annotated[
        list[str] | None, typer.Option("--signal", help="What is only shown.")
    ] = None,
    share: Annotated[float, typer.Option(help="Of the treatments together.")] = 0.5,
    alpha: Annotated[float, typer.Option(help="Chance of a false winner, all looks.")] = 0.05,
    on_win: Annotated[
        Literal["tell", "promote"], typer.Option(help="What a winner leads to.")
    ] = "tell",
    blind: Annotated[bool, typer.Option("--blind", help="Answers do not name the arm.")] = False,
    ramp: Annotated[
        list[str] | None,
        typer.Option(
            "--ramp",
            metavar="EXPOSURE[:TIME[:UNITS]]",
            help="A stage, held that long and for so many units: 0.02:1h:500. May be repeated.",
        ),
    ] = None,
    least_effect: Annotated[
        float | None, typer.Option(help="Stop when no treatment can be better by so much.")
    ] = None,
    max_units: Annotated[int | None, typer.Option(help="Stop at so many units.")] = None,
    prices: Annotated[
        str | None,
        typer.Option(metavar="PROMPT:GENERATED", help="Of a million tokens, for `cost`."),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Share no unit with its other experiments.")
    ] = None,
    layer_share: Annotated[
        float | None, typer.Option(help="Of the layer's units. Default: 0.5.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write an experiment down. The control is what production is now."""
    adapter = AdapterName.parse(name)
    metrics = make_metrics(metric, guardrails or ["errors"], signals or [])
    policy = Policy(
        alpha=alpha,
        on_win=on_win,
        blind=blind,
        ramp=read_ramp(ramp or []),
        least_effect=least_effect,
        max_units=max_units,
        prices=read_prices(prices) if prices else None,
    )
    part = layer_part(layer, layer_share)
    with open_registry(home) as registry, open_experiments(home) as store:
        arms = make_arms(registry, adapter, treatments, share)
        check_policy(arms, metrics, adapter, policy)
        made = store.create(adapter, arms, metrics, policy, layer=part, actor=actor())
    if as_json:
        return print_json(summarize(made))
    print(f"{made.id} is written. Run it with:")
    return print(f"  wardrobe experiment start {made.id}{'' if ramp else ' --exposure 0.1'}")


def _move(
    experiment_id: str,
    action: str,
    exposure: float | None,
    reason: str,
    home: Path | None,
    as_json: bool,
) -> None:
    with open_experiments(home) as store:
        found = store.get(experiment_id)
        moved = move(store, found, action, exposure=exposure, actor=actor(), reason=reason)
    if as_json:
        return print_json(summarize(moved))
    return print(f"{moved.id} is {moved.state}, exposure {100 * moved.exposure:g} %")


@app.command("start")
@clear_errors()
def start(
    experiment_id: Id,
    exposure: Annotated[
        float | None, typer.Option(help="Share of units that take part. Default: the first stage.")
    ] = None,
    reason: Reason = "started",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Split the traffic; running servers take it up once every arm is loaded and checked."""
    _move(experiment_id, "start", exposure, reason, home, as_json)


@app.command("ramp")
@clear_errors()
def ramp(
    experiment_id: Id,
    exposure: Annotated[float, typer.Option(help="The new share of units, above the old one.")],
    reason: Reason = "ramped",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let more units take part; none changes its arm."""
    _move(experiment_id, "ramp", exposure, reason, home, as_json)


@app.command("pause")
@clear_errors()
def pause(experiment_id: Id, reason: Reason, home: Home = None, as_json: Json = False) -> None:
    """Send everybody to production; what was counted stays."""
    _move(experiment_id, "pause", None, reason, home, as_json)


@app.command("stop")
@clear_errors()
def stop(experiment_id: Id, reason: Reason, home: Home = None, as_json: Json = False) -> None:
    """End it for good."""
    _move(experiment_id, "stop", None, reason, home, as_json)


@layer_app.command("create")
@clear_errors()
def create_layer(
    name: Annotated[str, typer.Argument(metavar="NAMESPACE/NAME")],
    holdout: Annotated[float, typer.Option(help="Share of units that no experiment gets.")] = 0.0,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a layer; `experiment create --layer NAME` takes a part of it."""
    layer = AdapterName.parse(name)
    with open_experiments(home) as store:
        made = store.add_layer(layer.namespace, layer.name, check_holdout(holdout))
    if as_json:
        return print_json(describe_layer(made))
    return print(f"{name} is made; {100 * holdout:g} % of the units are in no experiment of it")


@layer_app.command("show")
@clear_errors()
def show_layer(
    name: Annotated[str, typer.Argument(metavar="NAMESPACE/NAME")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show who has which part of a layer, and what is free."""
    layer = AdapterName.parse(name)
    with open_experiments(home) as store:
        facts = describe_layer(store.layer(layer.namespace, layer.name))
    if as_json:
        return print_json(facts)
    for taken in facts["taken"]:
        print(f"{taken['low']:g} to {taken['high']:g}  {taken['experiment']}")
    for low, high in facts["free"]:
        print(f"{low:g} to {high:g}  free")
    return print(f"{1 - facts['holdout']:g} to 1  holdout")


app.add_typer(looks)
app.add_typer(layer_app, name="layer")
