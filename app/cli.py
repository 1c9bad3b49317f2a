"""`kindred`: the command line."""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.client import IMAGE_SUFFIXES, Client, ClientError, Payload, check_writable, payload_of
from app.config import Settings
from app.db.migrate import upgrade
from app.errors import KindredError
from app.keys_cli import keys_cli
from app.sample import DIGITS, write_digits
from app.services.parameters import BACKBONES, MAX_CLUSTERS, MIN_CLUSTERS, Method, Parameters, Train
from app.up import running_service, running_url
from app.up import up as start_and_serve

cli = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # errors as plain lines, not boxes
    pretty_exceptions_enable=False,
    help="Groups an image collection by what the pictures show, without labels.",
)
cli.add_typer(keys_cli, name="keys")
console = Console()
messages = Console(stderr=True)

STAGES = {
    None: "waiting",
    "features": "looking at images",
    "auto": "finding how many groups",
    "heads": "finding groups to teach",
    "pixels": "decoding images",
    "training": "training",
    "encoding": "looking at images with what was learned",
    "answer": "finding groups in what was learned",
    "baseline": "comparing with k-means",
    "representatives": "choosing representatives",
    "done": "done",
}


def _clusters(text: str) -> str:
    """Lets `auto` and whole numbers pass; how many there may be, the parameters check."""
    if text != "auto" and not (text.isdecimal() and MIN_CLUSTERS <= int(text) <= MAX_CLUSTERS):
        raise typer.BadParameter(f"{text} is neither a whole number from {MIN_CLUSTERS} to {MAX_CLUSTERS} nor auto.")
    return text


Clusters = Annotated[
    str,
    typer.Option("--clusters", "-k", metavar="K", parser=_clusters, help="How many groups to form, or auto."),
]
MethodOption = Annotated[
    Method, typer.Option(help="scl; or, to compare: kmeans, kmeans_pixels, temi, scan, simclr, cc, pica.")
]
TrainOption = Annotated[
    Train | None,
    typer.Option(
        help="head: the network stays as it is; finetune: then it learns what the head found; full: it learns from "
        "the start. Unset: the method's usual way."
    ),
]
Backbone = Annotated[
    str | None, typer.Option(metavar="NAME", help=f"{', '.join(BACKBONES)}, or timm/NAME; unset: {BACKBONES[0]}.")
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="random, or a file in the service's weights folder; unset: the backbone's own."),
]
Truth = Annotated[
    str | None,
    typer.Option(help="`folder`: folder names are true labels, used only to report ACC, NMI, ARI."),
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same labels.")]
Server = Annotated[
    str | None,
    typer.Option(envvar="KINDRED_SERVER", help="URL of a running service; unset: our own is started."),
]


@cli.command()
def up(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the API.")] = None,
) -> None:
    """Start everything: PostgreSQL, Valkey, the API and the workers. Ctrl-C stops all of it."""
    settings = Settings() if port is None else Settings(port=port)
    raise typer.Exit(start_and_serve(settings))


@cli.command()
def migrate() -> None:
    """Bring the database named by KINDRED_DATABASE_URL to the newest schema."""
    url = Settings().database_url
    if url is None:
        raise KindredError("set KINDRED_DATABASE_URL; `kindred up` migrates its own database by itself")
    upgrade(url)
    console.print("The database has the newest schema.")


@cli.command()
def cluster(
    source: Annotated[Path, typer.Argument(metavar="PATH_OR_ARCHIVE", help="A folder, or a zip, tar or tar.gz.")],
    clusters: Clusters,
    method: MethodOption = "scl",
    train: TrainOption = None,
    backbone: Backbone = None,
    weights: Weights = None,
    truth: Truth = None,
    seed: Seed = 0,
    image_size: Annotated[int | None, typer.Option(min=32, max=1024, help="Pixels the backbone sees.")] = None,
    restarts: Annotated[int | None, typer.Option(min=1, max=64, help="Independent starts.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the images.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the labels.")] = Path("labels.csv"),
    name: Annotated[
        str | None,
        typer.Option(help="Of the new collection; unset: the folder's or the archive's.", show_default=False),
    ] = None,
    server: Server = None,
) -> None:
    """Group the images of a folder or an archive and write a label for each."""
    fields = {
        "clusters": clusters,
        "method": method,
        "train": train,
        "backbone": backbone,
        "weights": weights,
        "truth": truth,
        "seed": seed,
        "image_size": image_size,
        "restarts": restarts,
        "epochs": epochs,
    }
    _check(fields)
    fields["name"] = name
    check_writable(output)
    payload = payload_of(source)
    with _service(server) as url, _client(url) as client:
        _cluster(client, payload, fields, output)


@cli.command()
def demo(
    images: Annotated[Path | None, typer.Option(help="Your own folder or archive.")] = None,
    clusters: Annotated[
        str | None,
        typer.Option(
            "--clusters",
            "-k",
            metavar="K",
            parser=_clusters,
            help="How many groups to form; your own: auto unless said.",
        ),
    ] = None,
) -> None:
    """Group a sample collection and keep serving the result until Ctrl-C."""
    settings = Settings()
    folder = settings.data_dir / "demo"
    payload = payload_of(images or write_digits(folder / "digits"))
    fields = {
        "clusters": clusters or (DIGITS if images is None else "auto"),
        "truth": "folder" if images is None else None,
    }
    with _service(None) as url, _client(url) as client:
        run = _cluster(client, payload, fields, folder / "labels.csv")
        page = f"{url}/runs/{run['id']}"
        if os.environ.get("KINDRED_DEMO_EXIT") == "1":
            console.print(f"\nLook at the groups with `make up` and [bold]{page}[/]", soft_wrap=True)
            return
        console.print(f"\nLook at the groups: [bold]{page}[/]", soft_wrap=True)
        console.print("Serving until Ctrl-C.")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            console.print("Stopping.")


@cli.command("version")
def show_version() -> None:
    """Print the version."""
    console.print(version("kindred"))


def _check(fields: dict[str, Any]) -> None:
    """Refuse parameters that do not go together before anything is sent."""
    try:
        Parameters.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        wrong = [f"--{str(found['loc'][0]).replace('_', '-')}: {found['msg']}" for found in error.errors()]
        raise ClientError("; ".join(wrong)) from error


@contextmanager
def _service(server: str | None) -> Iterator[str]:
    """The service named, else the one that runs on this data folder, else one for the time of the job."""
    settings = Settings()
    url = server or settings.server or running_url(settings.data_dir)
    if url is not None:
        yield url.rstrip("/")
        return
    messages.print("Starting PostgreSQL, Valkey, the API and the workers …")
    with running_service(settings) as own:
        yield own


def _client(url: str) -> Client:
    key = Settings().api_key
    return Client(url, None if key is None else key.get_secret_value())


def _cluster(client: Client, payload: Payload, fields: dict[str, Any], output: Path) -> dict[str, Any]:
    """The whole journey, with a bar for each leg of it; the finished run."""
    form = {name: str(value) for name, value in fields.items() if value is not None}
    if payload.skipped:
        kinds = ", ".join(
            f"{number:,} {suffix or 'without a suffix'}" for suffix, number in Counter(payload.skipped).items()
        )
        read = " ".join(sorted(IMAGE_SUFFIXES))
        phones = " Save HEIC as JPEG first." if {".heic", ".heif"} & set(payload.skipped) else ""
        messages.print(f"Not sent: {escape(kinds)}. Images are told by their names: {read}.{phones}", highlight=False)
    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=messages,
    ) as bars:
        sending = bars.add_task("sending", total=payload.size, note="")
        run = client.cluster(payload, form, lambda done: bars.update(sending, completed=done))
        bars.update(sending, completed=payload.size)
        try:
            upload = _follow_upload(client, bars, run["links"]["upload"])
            run = _follow_run(client, bars, run["links"]["self"])
        except KeyboardInterrupt:
            client.cancel(run)
            raise ClientError("cancelled; the images stay in the service") from None
    if run["state"] != "succeeded":
        problem = run["problem"] or {"detail": "it was cancelled"}
        raise ClientError(problem["detail"])
    try:
        client.save(run["links"]["labels_csv"], output)
    except ClientError as error:
        raise ClientError(f"{error}; the labels stay at {client.server}{run['links']['labels_csv']}") from error
    _show(client, upload, run, output)
    return run


def _follow_upload(client: Client, bars: Progress, path: str) -> dict[str, Any]:
    task: TaskID = bars.add_task("checking images", total=1.0, note="")
    upload: dict[str, Any] = {}
    for upload in client.watch(path):
        counts = upload["counts"]
        bars.update(task, completed=upload["progress"], note=f"{counts['received']} files")
    if upload["state"] == "failed":
        raise ClientError(upload["problem"]["detail"])
    return upload


def _follow_run(client: Client, bars: Progress, path: str) -> dict[str, Any]:
    task: TaskID = bars.add_task("waiting", total=1.0, note="")
    run: dict[str, Any] = {}
    for run in client.watch(path):
        stage = STAGES.get(run["stage"], run["stage"])
        bars.update(task, completed=run["progress"], description=stage)
    return run


def _show(client: Client, upload: dict[str, Any], run: dict[str, Any], output: Path) -> None:
    table = Table(title=None)
    for heading, justify in (
        ("cluster", "right"),
        ("size", "right"),
        ("name", "left"),
        ("confidence", "right"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type] # a literal in a loop
    for row in client.items(run["links"]["clusters"]):
        confidence = "" if row["confidence"] is None else f"{row['confidence']:.2f}"
        table.add_row(str(row["cluster"]), str(row["size"]), escape(row["name"]), confidence)
    console.print(table)
    counts = upload["counts"]
    console.print(
        f"{counts['received']} files: {counts['accepted']} images, {counts['duplicate']} duplicates, "
        f"{counts['rejected']} rejected, {counts['ignored']} ignored"
    )
    if counts["duplicate"] or counts["rejected"]:
        console.print(f"ledger: {client.server}{upload['links']['files_csv']}", soft_wrap=True)
    metrics = run["metrics"] or {}
    quality, restarts = metrics.get("quality"), metrics.get("restarts") or {}
    if run["parameters"]["clusters"] == "auto":
        steady = (metrics.get("auto") or {}).get("steady")
        other = (
            f"; up to {steady} come out nearly alike from either half" if steady not in (None, run["clusters"]) else ""
        )
        console.print(
            f"clusters found: {run['clusters']}{other}; why: {client.server}{run['links']['report']}", soft_wrap=True
        )
    if quality:
        console.print(_quality(run["parameters"]["method"], quality))
    for name, other in (("frozen", "before the network learned"), ("baseline", "k-means, same features")):
        _show_beside(other, metrics.get(name) or {})
    if restarts.get("agreement") is not None:
        started = restarts.get("started", restarts["count"])
        chosen = f"{restarts['count']} of {started}" if started > restarts["count"] else restarts["count"]
        console.print(f"restarts: {chosen}, agree with each other to ARI {restarts['agreement']:.3f}")
    for warning in metrics.get("warnings") or []:
        console.print(f"[yellow]warning:[/] {escape(warning['message'])}")
    console.print(f"labels: {escape(str(output.resolve()))}", soft_wrap=True)


def _show_beside(name: str, other: dict[str, Any]) -> None:
    """Another grouping of the same images: its quality, or else how far it is like the run's."""
    if other.get("quality"):
        console.print(_quality(name, other["quality"]))
    elif other.get("agreement") is not None:
        console.print(f"{name}: agrees with it to ARI {other['agreement']:.3f}")


def _quality(name: str, found: dict[str, float]) -> str:
    return f"{name}: ACC {found['acc']:.3f}  NMI {found['nmi']:.3f}  ARI {found['ari']:.3f}"


def main() -> None:
    """Run the command; whatever fails is one clear line and a status that is not 0."""
    try:
        sys.exit(cli(sys.argv[1:] or ["--help"], standalone_mode=False))
    except typer.TyperException as error:
        _complain(error.format_message())
        sys.exit(error.exit_code)
    except ValidationError as error:
        if error.title != Settings.__name__:
            raise
        # Without the value: it may hold a password.
        wrong = [f"KINDRED_{'_'.join(map(str, found['loc'])).upper()}: {found['msg']}" for found in error.errors()]
        _complain("; ".join(wrong))
        sys.exit(1)
    except (ClientError, KindredError) as error:
        _complain(str(error))
        sys.exit(1)


def _complain(message: str) -> None:
    messages.print(f"[red]error:[/] {escape(message)}", soft_wrap=True)
