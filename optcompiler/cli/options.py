"""Options that more than one command has."""

from __future__ import annotations

from pathlib import Path

import click

from optcompiler.cli.models import dynamic_axes

target = click.option(
    "--target", default="onnxruntime", show_default=True, metavar="NAME[:KEY=VALUE,...]",
    help="Backend with its options, for example cpu:threads=2.",
)  # fmt: skip
precision = click.option(
    "--precision", default="auto", show_default=True,
    help="fp32 (exact passes only), precisions of the target joined by commas, or auto.",
)  # fmt: skip
calibration = click.option(
    "--calibration", metavar="REF",
    help="Folder of .npz files, module:name, or a source that makes samples: "
    "synthetic:count=64, select:count=64,source=REF, augment:count=512,source=REF.",
)  # fmt: skip
calibration_samples = click.option(
    "--calibration-samples", type=click.IntRange(1), metavar="N",
    help="Samples that are kept of it at most; by default 512, or as many as a source makes.",
)  # fmt: skip
max_damage = click.option(
    "--max-damage", type=float, help="Loss of agreement with the model as imported."
)
damage = click.option(
    "--damage", default="kl", show_default=True, help="Measure of damage: kl or nmse."
)
passes = click.option(
    "--pass", "passes", multiple=True, metavar="NAME[:OPTION=VALUE,...]",
    help="Run this pass instead of the default ones; may be repeated. `default` stands for those.",
)  # fmt: skip
dynamic = click.option(
    "--dynamic", multiple=True, callback=dynamic_axes, metavar="[NAME:AXIS=]SYMBOL[=LEAST..MOST]",
    help="Keep axis AXIS of input NAME symbolic; SYMBOL alone: axis 0 of every input. With bounds "
    "the artifact takes every size from the one to the other.",
)  # fmt: skip
seed = click.option("--seed", default=0, show_default=True)
time_limit = click.option(
    "--time-limit", "time_limit_s", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
    help="What a pass may take to propose, and for each rewrite, per begun thousand of nodes; in "
    "place of what the passes say.",
)  # fmt: skip
reproducers = click.option(
    "--reproducers", type=click.Path(path_type=Path), metavar="DIR",
    help="Where reproducers go; by default into the user's cache.",
)  # fmt: skip
check = click.option(
    "--check", "command", metavar="CMD",
    help="Program with its arguments, no shell; {} stands for the path of what is to be judged, at "
    "the end where there is none. Exit status 0: good; 125: cannot tell; 1 to 127: bad.",
)  # fmt: skip
check_seconds = click.option(
    "--check-seconds", type=click.FloatRange(0, min_open=True), default=600, show_default=True,
    help="What one run of CMD may take.",
)  # fmt: skip
