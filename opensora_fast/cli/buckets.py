"""Show which buckets the clips fall into and what is left out: `buckets explain`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from opensora_fast.cli._options import TRAINING_CONFIG_HELP, Overrides

app = typer.Typer(no_args_is_help=True)


@app.callback()
def buckets() -> None:
    """Buckets: resolution, frames and aspect ratio."""


@app.command()
def explain(
    meta: Annotated[Path, typer.Argument(help="Manifest of the clips, .csv or .parquet.")],
    config: Annotated[Path, typer.Option("--config", help=TRAINING_CONFIG_HELP)],
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    epoch: Annotated[int, typer.Option(min=0, help="Epoch; each draws the keep probabilities anew.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show for every bucket its clips, micro-batches and tokens, and why clips are left out.

    Exits with 1 if there would be nothing to train on.
    """
    from opensora_fast.config import load_train_config
    from opensora_fast.data.buckets.bucket import Bucket
    from opensora_fast.data.buckets.explain import describe_no_batches, explain_buckets
    from opensora_fast.data.manifest import Manifest
    from opensora_fast.parallel.join import count_replicas
    from opensora_fast.train.locate_config import locate_config

    settings = load_train_config(locate_config(config), overrides or []).config
    explanation = explain_buckets(
        Manifest.read(meta),
        Bucket(settings.bucket_config),
        frame_interval=settings.dataset.frame_interval,
        seed=settings.seed,
        epoch=epoch,
        world_size=count_replicas(world_size, settings.sp_size),
        drop_last=settings.drop_last,
        patch=settings.model.patch_size[1],
    )
    print(json.dumps(explanation.to_dict(), indent=2) if as_json else explanation.to_text())
    if explanation.steps == 0:
        raise ValueError(describe_no_batches(explanation))
