"""`ddim info`: what a model is."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import DEFAULT_MODEL, choose_model


def info(
    model: options.ModelArgument = None,
    model_option: options.ModelOption = None,
    weights: options.Weights = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's location, size, cost and configuration.

    Examples:
      ddim info mnist

      ddim info runs/mine/final --json
    """
    from ddim.info import describe

    facts = describe(choose_model(model, model_option, DEFAULT_MODEL, weights))
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, entry in value.items():
                print(f"  {key}: {entry}")
        else:
            print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
