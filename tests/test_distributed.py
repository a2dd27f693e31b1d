"""The environment of launchers: complete ones are believed, all others are refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ddim.distributed import LAUNCHER_VARIABLES, job_name, rank_and_world_size

COMPLETE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}

SetEnvironment = Callable[[dict[str, str]], None]


@pytest.fixture
def set_environment(monkeypatch: pytest.MonkeyPatch) -> SetEnvironment:
    def set_variables(variables: dict[str, str]) -> None:
        for name in (*LAUNCHER_VARIABLES, "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_complete_environments(set_environment: SetEnvironment) -> None:
    set_environment({})
    assert (rank_and_world_size(), job_name()) == ((0, 1), "")
    set_environment(COMPLETE | {"LOCAL_WORLD_SIZE": "2"})
    assert (rank_and_world_size(), job_name()) == ((1, 4), "10.0.0.1:29500 4")
    set_environment(COMPLETE | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    assert (rank_and_world_size(), job_name()) == ((0, 1), "")


@pytest.mark.parametrize("missing", LAUNCHER_VARIABLES)
def test_incomplete_environment_raises(set_environment: SetEnvironment, missing: str) -> None:
    set_environment({name: value for name, value in COMPLETE.items() if name != missing})
    with pytest.raises(ValueError, match=rf"but not {missing}; start several processes with torchrun"):
        rank_and_world_size()
    set_environment(COMPLETE | {missing: ""})
    with pytest.raises(ValueError, match=rf"but not {missing}; start several processes with torchrun"):
        rank_and_world_size()


@pytest.mark.parametrize("alone", ["RANK", "WORLD_SIZE"])
def test_variable_alone_raises(set_environment: SetEnvironment, alone: str) -> None:
    set_environment({alone: "1"})
    with pytest.raises(ValueError, match=rf"^the environment has {alone}=1 but not .*, or unset RANK and WORLD_SIZE$"):
        rank_and_world_size()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", "4", "an integer from 0 to 3, got 4"),
        ("RANK", "-1", "an integer from 0 to 3, got -1"),
        ("RANK", "one", "an integer from 0 to 3, got 'one'"),
        ("WORLD_SIZE", "0", "an integer of at least 1, got 0"),
        ("WORLD_SIZE", "1e3", "an integer of at least 1, got '1e3'"),
        ("LOCAL_RANK", "4", "an integer from 0 to 3, got 4"),
        ("LOCAL_WORLD_SIZE", "5", "an integer from 1 to 4, got 5"),
        ("LOCAL_WORLD_SIZE", "1", "LOCAL_RANK must be an integer from 0 to 0, got 1"),
        ("MASTER_PORT", "http", "an integer from 0 to 65535, got 'http'"),
    ],
)
def test_contradictions_raise(set_environment: SetEnvironment, name: str, value: str, expected: str) -> None:
    set_environment(COMPLETE | {name: value})
    with pytest.raises(ValueError, match="the environment variable ") as caught:
        rank_and_world_size()
    assert str(caught.value).endswith(expected)
