"""Inner optimizers, which step on the trained parameters, by name."""

import inspect
import logging
from importlib import import_module
from typing import Any

import torch

from optim.composite import CompositeOptimizer

logger = logging.getLogger(__name__)

INNER_OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adam": "torch.optim.Adam",
    "sgd": "torch.optim.SGD",
    "adafactor": "optim.adafactor.Adafactor",
    "adamw8bit": "torchao.optim.AdamW8bit",
    "muon": "optim.muon.MuonAndAdamW",
    "normuon": "optim.normuon.NorMuonAndAdamW",
    "galore": "galore_torch.GaLoreAdamW",
    "apollo": "apollo_torch.APOLLOAdamW",
    "fira": "pytorch_optimizer.Fira",
}
WITHOUT_SECOND_MOMENTS = ("muon", "normuon", "sgd")  # for the parameters of linear layers
# The requirements file of each optional package.
REQUIREMENTS = {
    "torchao": "requirements-extra.txt",
    "galore_torch": "requirements-baselines.txt",
    "apollo_torch": "requirements-baselines.txt",
    "pytorch_optimizer": "requirements-baselines.txt",
}


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer class for ``name``: "adamw", another key of INNER_OPTIMIZERS, or a path like "torch.optim.NAdam".

    Raises:
        ValueError: an unknown name, or a path that cannot be imported or is not a torch.optim.Optimizer.
    """
    path = INNER_OPTIMIZERS.get(name, name)
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        raise ValueError(
            f"optim.inner={name} is unknown; choose from {', '.join(INNER_OPTIMIZERS)}, or give the dotted path of a "
            "torch.optim.Optimizer"
        )
    try:
        cls = getattr(import_module(module_name), class_name, None)
    except ImportError as error:
        file = REQUIREMENTS.get(module_name.partition(".")[0])
        fix = f"run .venv/bin/pip install -r {file}" if file else "check the path"
        raise ValueError(f"optim.inner={name}: cannot import {module_name} ({error}); {fix}") from None
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(f"optim.inner={name}: {path} is not a torch.optim.Optimizer; check the path")
    return cls


def inner_optimizer(name: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """The optimizer ``name`` for ``groups``. Unsupported options are left out; the other options are logged.

    Optimizers with a fused step, such as AdamW, use it. SGD does not: its fused step cannot start the momentum of reset
    rows while other rows have a momentum.

    Args:
        name: see ``optimizer_class``.
        groups: from ``optim.param_groups.parameter_groups``.
        options: keyword arguments such as betas, eps and momentum.

    Raises:
        ValueError: as in ``optimizer_class``, or a group with weight decay for an optimizer that has none.
    """
    cls = optimizer_class(name)
    known = inspect.signature(cls).parameters
    if cls is not torch.optim.SGD:
        options = {"fused": True} | options
    # Adafactor's eps is a pair with a different meaning.
    taken = {
        k: v for k, v in options.items() if k in known and isinstance(known[k].default, tuple) == isinstance(v, tuple)
    }
    if "weight_decay" not in known and any(group.get("weight_decay") for group in groups):
        raise ValueError(f"optim.weight_decay: {cls.__name__} (optim.inner={name}) has none; set it to 0")
    given = ", ".join(f"{k}={v}" for k, v in taken.items()) or "its defaults"
    logger.info("%s with %s", INNER_OPTIMIZERS.get(name, name), given)
    return cls(groups, **taken)


def optimizer_of_groups(
    inner: str, embedding_inner: str | None, groups: list[dict[str, Any]], **options: Any
) -> torch.optim.Optimizer:
    """The optimizer named ``inner`` for ``groups``, or for all groups but "embeddings" if ``embedding_inner`` is given.

    The optimizer named ``embedding_inner`` then steps on the group "embeddings". Groups, options and errors are those
    of ``inner_optimizer``.
    """
    embeddings = [group for group in groups if group["name"] == "embeddings"]
    if embedding_inner is None or not embeddings:
        return inner_optimizer(inner, groups, **options)
    others = [group for group in groups if group["name"] != "embeddings"]
    parts = [inner_optimizer(inner, others, **options), inner_optimizer(embedding_inner, embeddings, **options)]
    return CompositeOptimizer(parts)
