"""``raycolbert <job> RECIPE``: every job as a command.

A command runs here, on an embedded Ray or on the cluster it was submitted to; with ``--address`` it
submits itself to a cluster and follows the log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.launch import Address, Debug, Json, Overrides, RecipePath, launch
from jobs.registry_cli import app as registry_app

app = typer.Typer(
    name="raycolbert",
    help="Train and serve ColBERT-style multi-vector retrievers on a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(registry_app, name="registry", help="Look at, verify, promote and clean up what is published.")


def _add_plain(job: str, text: str) -> None:
    """Adds the command of a job that takes a recipe and nothing else."""

    @app.command(job, help=text)
    def command(
        recipe: RecipePath,
        overrides: Overrides = None,
        address: Address = None,
        as_json: Json = False,
        debug: Debug = False,
    ) -> None:
        launch(job, recipe, overrides or (), address=address, as_json=as_json, debug=debug)


_add_plain(
    "mine_negatives", "Find hard negatives for labelled questions with BM25, dense or ColBERT retrieval."
)


_add_plain("score_teacher", "Score mined or given tuples with the teacher: a cross-encoder or an ensemble.")


@app.command("train")
def train(
    recipe: RecipePath,
    phase: Annotated[str | None, typer.Option(help="one phase; default: all, in order")] = None,
    overrides: Overrides = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Distil the teacher into a ColBERT model; a run that was stopped goes on where it was."""
    launch("train", recipe, overrides or (), address=address, as_json=as_json, debug=debug, phase=phase)


@app.command("ablate")
def ablate(
    recipe: RecipePath,
    report: Annotated[Path | None, typer.Option(help="folder for report.json; default: none")] = None,
    overrides: Overrides = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train the variants of a recipe from several seeds and compare them; finished trials are kept."""
    launch("ablate", recipe, overrides or (), address=address, as_json=as_json, debug=debug, report=report)


_add_plain("average", "Average the weights of several checkpoints into one model.")


_add_plain("index", "Encode a corpus and build a sharded index of it.")


IndexOption = Annotated[
    str | None,
    typer.Option(metavar="NAME@ALIAS", help="version or alias; default: serve.index, index.name@production"),
]
PromoteOption = Annotated[
    bool, typer.Option("--promote", help="point the alias to the new version, if nobody moved it meanwhile")
]


@app.command("update_index")
def update_index(
    recipe: RecipePath,
    index: IndexOption = None,
    add: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Parquet or JSONL of documents to add, as in data.sources"),
    ] = None,
    delete: Annotated[
        str | None, typer.Option(metavar="FILE", help="text file of ids to delete, one a line")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="added documents replace those with the same id")
    ] = False,
    promote: PromoteOption = False,
    overrides: Overrides = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add documents to a published index and delete some from it: a new version; paths as in the recipe."""
    launch(
        "update_index",
        recipe,
        overrides or (),
        address=address,
        as_json=as_json,
        debug=debug,
        index=index,
        add=add,
        delete=delete,
        replace=replace,
        promote=promote,
    )


@app.command("compact_index")
def compact_index(
    recipe: RecipePath,
    index: IndexOption = None,
    shards: Annotated[int | None, typer.Option(help="default: as many as the build made")] = None,
    promote: PromoteOption = False,
    overrides: Overrides = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a changed index anew, without its deleted documents and delta shards: a new version."""
    launch(
        "compact_index",
        recipe,
        overrides or (),
        address=address,
        as_json=as_json,
        debug=debug,
        index=index,
        shards=shards,
        promote=promote,
    )


_add_plain("evaluate", "Compare retrievers on labelled questions, with paired 95 % intervals.")


_add_plain("serve", "Serve an index over HTTP until interrupted.")


@app.command("pipeline")
def pipeline(
    recipe: RecipePath,
    report: Annotated[
        Path | None, typer.Option(help="folder for report.html and report.json; default: none")
    ] = None,
    overrides: Overrides = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """All jobs in order, from raw text to answers over HTTP; what exists already is not made again."""
    launch("pipeline", recipe, overrides or (), address=address, as_json=as_json, debug=debug, report=report)


def main() -> None:
    """Entry point of the ``raycolbert`` command."""
    app()


if __name__ == "__main__":
    main()
