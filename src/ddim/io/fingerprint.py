"""Fingerprints: SHA-256 of what decides a result, by which files and caches tell whether they belong to it."""

from __future__ import annotations

import hashlib
from typing import Any

from ddim.io.config import to_json
from ddim.io.weights import digest


def model_sha256(pipe: Any) -> str:
    """SHA-256 of all that decides what a code means: weights with their dtype, the network's configuration, the
    schedule and what the network predicts. Hexadecimal.
    """
    sha256 = hashlib.sha256()
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in pipe.unet.state_dict().items()}
    sha256.update(digest(weights).encode())
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    sha256.update(to_json(config).encode())
    sha256.update(pipe.scheduler.config.prediction_type.encode())
    sha256.update(pipe.scheduler.alphas_cumprod.cpu().numpy().tobytes())
    return sha256.hexdigest()
