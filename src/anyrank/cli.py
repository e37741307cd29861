"""The command line. Thin: it parses, calls the Python API, prints, and turns errors into exit codes.

Exit codes: 0 done, 1 a run or a folder failed, 2 a wrong recipe or option, 130 interrupted.
"""

import importlib.util
import json
import os
import shlex
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from anyrank.errors import AnyrankError, ConfigError, TransportError

if TYPE_CHECKING:
    from anyrank.config import Recipe

__all__ = ["app", "main"]

app = typer.Typer(
    help="Federated LoRA fine-tuning in which every client trains at the rank its device can afford.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(markup=False)
_errors = Console(stderr=True, markup=False)

# Threads that wait for each other by spinning are five to ten times slower as soon as another program wants a core. Read
# when torch is first loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML recipe; the embedded default if left out.")
]
Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as method.name=rbla. Repeatable."),
]


Data = Annotated[
    str | None, typer.Option(help="Your own examples, without a recipe: a file, a folder, or a name on the hub.")
]
Model = Annotated[str | None, typer.Option(help="The base model, beside --data or in place of the recipe's.")]
Rank = Annotated[
    str | None, typer.Option(help="One rank for all devices, or auto: the largest that each device affords.")
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show tracebacks of errors.")] = False,
) -> None:
    _Debug.on = debug


class _Debug:
    on = False


@app.command()
def run(
    recipe: RecipeFile = None,
    settings: Settings = [],  # noqa: B006 - typer copies it
    out: Annotated[Path | None, typer.Option(help="The run folder; by default the next free one in runs/.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Continue the run in this folder.")] = None,
    data: Data = None,
    model: Model = None,
    rank: Rank = None,
    engine: Annotated[
        str, typer.Option(metavar="local|flower-sim", help="This machine's processes, or Flower's simulation on Ray.")
    ] = "local",
) -> None:
    """Fine-tune a model across devices of different ranks."""
    if resume and (recipe or out or data or model or rank):
        raise ConfigError(
            "--resume continues a run with its own recipe in its own folder; leave out everything but --set and --engine."
        )
    from anyrank import api
    from anyrank.display import LiveObserver, summary

    with LiveObserver(console) as observer:
        try:
            if resume:
                folder = api.resume(resume, overrides=settings, observer=observer, engine=engine)
            else:
                loaded = _loaded(recipe, settings, data, model, rank)
                out = out or _next_free(loaded.baseline or loaded.method["name"])
                command = shlex.join(["anyrank", *sys.argv[1:]])
                folder = api.run(loaded, out, observer=observer, command=command, engine=engine)
        except (KeyboardInterrupt, OSError, TransportError):
            started = resume or out
            if started and (started / "run.json").exists():
                again = f" --engine {engine}" if engine != "local" else ""
                _errors.print(f"\nStopped. Continue with: anyrank run --resume {started}{again}", soft_wrap=True)
            raise
    console.print(*summary(folder), sep="\n")
    console.print(f"\nRun folder: {folder.path}\nReport:     anyrank report {folder.path}", soft_wrap=True)


def _loaded(
    recipe: Path | None, settings: list[str], data: str | None, model: str | None, rank: str | None
) -> "Recipe":
    """The recipe that options ask for."""
    from anyrank import api, config
    from anyrank.own_data import recipe_for

    overrides = config.parse_overrides(settings)
    if model:
        overrides = {"model.name": model, **overrides}
    if rank == "auto":
        overrides = {"ranks.name": "auto", **overrides}
    elif rank:
        if not rank.isdecimal() or int(rank) == 0:
            raise ConfigError(f"--rank {rank}: expected a whole number from 1 on, or auto.")
        overrides = {"ranks": {"name": "ratios", "values": [1.0], "of": int(rank)}, **overrides}
    if not data:
        return api.load_recipe(recipe, overrides)
    if recipe:
        return api.load_recipe(recipe, {"data.source": data, **overrides})
    return recipe_for(data, overrides)


def _next_free(name: str) -> Path:
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


@app.command()
def check(
    recipe: RecipeFile = None,
    settings: Settings = [],  # noqa: B006
    data: Data = None,
    model: Model = None,
    rank: Rank = None,
) -> None:
    """Show what a recipe asks of each device class, without training."""
    from anyrank import api
    from anyrank.display import demand_table

    demands, remarks = api.check(_loaded(recipe, settings, data, model, rank))
    console.print(demand_table(demands, recipe or data or "embedded default"))
    for remark in remarks:
        console.print(f"note: {remark}")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its hyperparameters.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the methods and what they promise."""
    from anyrank.methods import METHODS, describe, overview

    if name and name not in METHODS:
        raise ConfigError(f"there is no method {name!r}; there are: {', '.join(METHODS)}.")
    described = [describe(each) for each in ([name] if name else METHODS)]
    if as_json:
        typer.echo(json.dumps(described[0] if name else described, indent=2))
    elif name:
        console.print(described[0]["text"])
        for argument, default in described[0]["arguments"].items():
            console.print(f"  method.{argument} = {default}")
    else:
        head, *rows = overview()
        promises, costs = (Table(box=box.SIMPLE, padding=(0, 1, 0, 0)) for _ in range(2))
        for header in head[:8]:
            promises.add_column(header.replace(" ", "\n"), no_wrap=True)
        for header in (head[0], *head[8:]):
            costs.add_column(header, no_wrap=True)
        for method, paper, *rest in rows:
            promises.add_row(method, paper.rpartition(", ")[2].removeprefix("arXiv "), *rest[:6])
            costs.add_row(method, *rest[6:])
        console.print(promises, costs, sep="")
        console.print(
            "Papers by arXiv number. Down and up: numbers that travel for each layer; m = d_out, n = d_in, r the"
        )
        console.print(
            "server's rank, r_k the client's. Server cost for each layer; R is the sum of the clients' ranks."
        )


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about one or more runs."""
    from anyrank.paths import replace_file
    from anyrank.report import render

    page = render(folders)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists() and not output.is_file():  # such as /dev/stdout; of a folder this is the error
        output.write_text(page, encoding="utf-8")
    else:
        replace_file(output.resolve(), page.encode())
    console.print(f"Report: {output}", soft_wrap=True)


@app.command()
def probe(
    recipe: RecipeFile = None,
    settings: Settings = [],  # noqa: B006
    data: Data = None,
    model: Model = None,
    name: Annotated[str, typer.Option(help="What recipes are to call the device.")] = "this-machine",
) -> None:
    """Measure this machine with a recipe's model, as a device profile for recipes."""
    from anyrank import api

    typer.echo(api.probe(_loaded(recipe, settings, data, model, None), name), nl=False)


Finished = Annotated[
    Path, typer.Argument(metavar="DIR", help="A finished run, one of its adapters, or a merged model.")
]
Base = Annotated[str | None, typer.Option(help="Where the base model is, if its name does not lead to it.")]


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A finished run; with --merge also one of its adapters.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder.")],
    rank: Annotated[int | None, typer.Option(help="Rank of the exported adapter.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write base and adapter as one model.")] = False,
    base: Base = None,
) -> None:
    """Write the best adapter of one rank as a PEFT directory, or base and adapter merged into one model."""
    if (rank is None) != merge or (base and not merge):
        raise ConfigError("expected one of --rank R and --merge, and --base beside --merge alone.")
    if merge:
        from anyrank import answers

        answers.merge(folder, output, base=base)
        console.print(f"Merged model: {output}", soft_wrap=True)
        return
    from anyrank import results

    assert rank is not None
    adapter = results.export(folder, rank, output)
    console.print(f"Adapter of rank {rank}, {adapter.num_parameters:,} parameters: {output}", soft_wrap=True)


@app.command()
def evaluate(
    folder: Finished,
    data: Annotated[str, typer.Option(help="A file, a folder, or a name on the hub; its test part, if it has one.")],
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Of the problem's table, such as label=rating. Repeatable."),
    ] = [],  # noqa: B006
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Score what came out of a run on data."""
    from anyrank import answers

    score = answers.score(folder, data, base=base, settings=settings)
    values = {**score.metrics, "loss": score.loss, "examples": score.num_examples}
    if as_json:
        typer.echo(json.dumps(values))
        return
    table = Table("metric", "", box=box.SIMPLE)
    for name, value in values.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


@app.command()
def generate(
    folder: Finished,
    prompt: Annotated[str, typer.Argument(help="An instruction, or the beginning of a text.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many.")] = 128,
    base: Base = None,
) -> None:
    """Have a language model answer once."""
    from anyrank import answers

    typer.echo(answers.generate(folder, prompt, base=base, max_new_tokens=max_new_tokens))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run, or a PEFT directory from anyrank.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="On the Hugging Face hub, such as user/tickets.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload an adapter with its model card to the Hugging Face hub."""
    from anyrank import hub

    console.print(f"Uploaded: {hub.push(folder, name, private=private)}", soft_wrap=True)


flower = typer.Typer(help="Runs on several machines, through Flower (extra anyrank\\[flower]).", no_args_is_help=True)
app.add_typer(flower, name="flower")
Insecure = Annotated[bool, typer.Option("--insecure", help="Without TLS and keys: on one machine only.")]


@flower.command()
def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where they are kept.")],
    host: Annotated[list[str], typer.Option(help="A name or address of the server. Repeatable.")] = [],  # noqa: B006
    client: Annotated[list[str], typer.Option(help="A client's name. Repeatable.")] = [],  # noqa: B006
) -> None:
    """Make an authority, the server's certificate, and a key for each client; what is there is kept."""
    _need_flower()
    from anyrank.flower.keys import make_keys

    for file in make_keys(folder, hosts=host, clients=client):
        console.print(f"written: {file}", soft_wrap=True)


Keys = Annotated[Path | None, typer.Option(help="What `anyrank flower keys` made.")]
State = Annotated[Path | None, typer.Option(metavar="DIR", help="The server's folder; by default OUT.flower.")]
Link = Annotated[str, typer.Option(metavar="NAME", help="A connection in the folder's config.toml.")]
Clients = Annotated[int, typer.Option(min=0, help="How many to wait for; 0: as many as a round samples.")]
Deadline = Annotated[float, typer.Option(min=0, help="Seconds for a round; 0: the recipe's, if any.")]
Patience = Annotated[float, typer.Option(min=0, help="Seconds to wait for clients; 0: as long as it takes.")]
Compression = Annotated[str, typer.Option(help="Of what travels: none, fp16 or int8.")]
TimesOf = Annotated[str, typer.Option(help="How fast devices are: as measured, or as their profile says.")]


@flower.command()
def server(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML recipe to play.")] = None,
    out: Annotated[Path | None, typer.Option(help="Its run folder; a run that is there is gone on with.")] = None,
    keys: Keys = None,
    host: Annotated[str, typer.Option(help="Where clients reach the server; 0.0.0.0 for everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 9443,
    state: State = None,
    settings: Settings = [],  # noqa: B006
    clients: Clients = 0,
    deadline: Deadline = 0.0,
    patience: Patience = 0.0,
    compression: Compression = "none",
    times: TimesOf = "measured",
    insecure: Insecure = False,
) -> None:
    """Play a recipe with clients on other machines; without one, serve `anyrank flower run` until interrupted."""
    _need_flower()
    from anyrank.flower import link
    from anyrank.flower.programs import stop_when_told

    if (keys is None) != insecure:
        raise ConfigError("expected one of --keys DIR and --insecure.")
    if (recipe is None) != (out is None) or (recipe is None and state is None):
        raise ConfigError(
            "expected RECIPE with --out DIR, or, to serve runs that are started later, --state DIR alone."
        )
    told = settings or clients or deadline or patience or compression != "none" or times != "measured"
    if recipe is None and told:
        raise ConfigError(
            "without RECIPE, name what is about a run with `anyrank flower run`: only the server starts here."
        )
    order = None
    if recipe and out:
        order = link.Order(
            recipe=recipe,
            out=out,
            settings=settings,
            clients=clients,
            deadline=deadline,
            patience=patience,
            compression=compression,
            times=times,
        )
        state = state or out.with_name(f"{out.name}.flower")
    assert state
    stop_when_told()
    with link.serving(state, keys=keys, host=host, port=port) as superlink:
        at = f"{'HOST' if host in ('0.0.0.0', '::') else host}:{port}"
        console.print(f"Clients: anyrank flower client --server {at} --name NAME --data PATH ...", soft_wrap=True)
        if order is None:
            console.print(
                f"Runs:    anyrank flower run RECIPE --out DIR --state {state}\nCtrl-C ends the server.", soft_wrap=True
            )
            superlink.wait()
            raise TransportError(
                f"Flower's SuperLink has ended; the same command starts it anew. Its log: {state / 'superlink.log'}"
            )
        elif not link.play(state, order):
            raise TransportError(
                f"the run did not end well; the same command goes on with it. Flower's log: {state / 'superlink.log'}"
            )


@flower.command(name="run")
def flower_run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML recipe.")],
    out: Annotated[Path, typer.Option(help="The run folder; a run that is there is gone on with.")],
    state: Annotated[Path, typer.Option(metavar="DIR", help="The server's folder.")],
    link: Link = "anyrank",
    settings: Settings = [],  # noqa: B006
    clients: Clients = 0,
    deadline: Deadline = 0.0,
    patience: Patience = 0.0,
    compression: Compression = "none",
    times: TimesOf = "measured",
) -> None:
    """Have a server that is running play a recipe, and wait; exit status 0 only if it was played to its end."""
    _need_flower()
    from anyrank.flower.link import Order, play

    order = Order(
        recipe=recipe,
        out=out,
        settings=settings,
        clients=clients,
        deadline=deadline,
        patience=patience,
        compression=compression,
        times=times,
    )
    try:
        well = play(state, order, link=link)
    except KeyboardInterrupt:
        console.print(f"The run goes on; anyrank flower status --state {state} shows how far it is.", soft_wrap=True)
        raise
    if not well:
        raise TransportError(f"the run did not end well; the same command goes on with it. Flower's log is in {state}.")


@flower.command()
def status(
    state: Annotated[Path, typer.Option(metavar="DIR", help="The server's folder.")],
    link: Link = "anyrank",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show a server's clients and runs."""
    _need_flower()
    from dataclasses import asdict

    from anyrank.flower.link import status

    found = status(state, link=link)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    clients, runs = Table("client", "status", "since", box=box.SIMPLE), Table(box=box.SIMPLE)
    for each in found.clients:
        clients.add_row(each["name"], each["status"], each["since"])
    for column in ("run", "status", "round", "time", "folder"):
        runs.add_column(column, overflow="fold")
    for each in found.runs:
        played = "" if each["round"] is None else f"{each['round']}/{each['rounds']}"
        took = str(timedelta(seconds=round(each["seconds"])))
        runs.add_row(each["number"], each["status"], played, took, each["folder"] or "")
    console.print(clients, runs)


@flower.command()
def client(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server.")],
    data: Annotated[str, typer.Option(help="This client's examples: a file, or a folder with a train file.")],
    name: Annotated[str, typer.Option(help="This client's name, another one for each.")],
    ca: Annotated[Path | None, typer.Option(help="The authority's certificate, ca.crt.")] = None,
    key: Annotated[Path | None, typer.Option(help="This client's private key.")] = None,
    device: Annotated[str | None, typer.Option(help="Its device class, one of the recipe's.")] = None,
    profile: Annotated[Path | None, typer.Option(help="What `anyrank probe` printed, in place of a class.")] = None,
    state: Annotated[Path | None, typer.Option(help="A folder for what it keeps.")] = None,
    insecure: Insecure = False,
) -> None:
    """Take part with this machine's data, until interrupted."""
    _need_flower()
    from anyrank.flower.join import join
    from anyrank.flower.programs import stop_when_told

    if insecure and (ca or key):
        raise ConfigError("--insecure goes without --ca and --key.")
    if not insecure and (missing := [name for name, file in (("--ca", ca), ("--key", key)) if file is None]):
        raise ConfigError(
            f"{' and '.join(missing)}: missing. Name ca.crt and clients/NAME of what `anyrank flower keys` made on the server, "
            "or --insecure on one machine alone."
        )
    stop_when_told()
    join(server, name=name, data=data, ca=ca, key=key, device=device, profile=profile, state=state)


def _need_flower() -> None:
    if importlib.util.find_spec("flwr") is None:
        raise ConfigError("Flower is not installed; install it with `pip install 'anyrank[flower]'`.")


def main() -> None:
    """Entry point: errors of ours become one message and an exit code."""
    _Debug.on = False
    try:
        app()
    except AnyrankError as error:
        _fail(error, str(error), 2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(error, f"{where}{error.strerror or error}.", 1)


def _fail(error: Exception, message: str, code: int) -> None:
    if _Debug.on:
        raise error
    _errors.print("error: ", style="bold red", end="")
    _errors.print(message, soft_wrap=True)
    sys.exit(code)
