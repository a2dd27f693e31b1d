"""`ddim info`: what a model is."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def info(
    model: Annotated[str, typer.Argument(help="A built-in model, a folder, or a hub id.")] = "mnist",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's location, size, cost and configuration.

    Examples:
      ddim info mnist

      ddim info runs/mine/final --json
    """
    from ddim.info import describe

    facts = describe(model)
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
