"""`cafe export`: a trained run as a folder that other programs use, and as a model of MLflow."""

from __future__ import annotations

import click

from jobs.terminal import open_workspace, say


@click.command()
@click.argument("run")
@click.option("--output", metavar="FOLDER", help="Where to write it; default: exports/RUN in the workspace.")
@click.option("--mlflow", is_flag=True, help="Log the exported model in MLflow too, with signature and input example.")
@click.option("--register", metavar="NAME", help="Log it and register it under this name in MLflow's model registry.")
@click.option("--mlflow-uri", help="MLflow tracking server; default: the workspace's own database.")
def export(run: str, output: str | None, mlflow: bool, register: str | None, mlflow_uri: str | None) -> None:
    """Export a trained run as ONNX, safetensors and a model card: `cafe export cafe-news-s0 --output model`.

    RUN is the name of a run of this workspace or its unambiguous beginning. The graph holds everything from the pixels of an
    aligned face to seven probabilities, and is checked against PyTorch on real faces. Needs `pip install 'cafe[export]'`.
    """
    from cafe.files import locate
    from pipeline.release.export import export_run

    workspace = open_workspace()
    name = workspace.find_run(run)
    exported = export_run(workspace, name, locate(output) if output else workspace.root / "exports" / name)
    say(
        f"Wrote {exported.folder}: on {exported.faces} faces the graph differs from PyTorch by at most "
        f"{exported.difference:.1e}. Read README.md there before you ship it."
    )
    if mlflow or register:
        from pipeline.release.pyfunc import log_model
        from pipeline.tracking import Mirror

        say(log_model(Mirror(workspace, mlflow_uri), workspace.run_path(name), exported.folder, register))
