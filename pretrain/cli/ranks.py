"""The rank and the number of processes of a run, from the environment variables of torchrun."""

import os


def is_main_from_env() -> bool:
    return os.environ.get("RANK", "0") == "0"


def world_size_from_env() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_one_node_from_env() -> bool:
    """Whether all processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == world_size_from_env()
