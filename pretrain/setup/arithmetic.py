"""Precision and determinism of a GPU's arithmetic."""

import logging
import os

import torch

from pretrain.config.schema import Config

logger = logging.getLogger(__name__)


def set_arithmetic(config: Config, device: torch.device) -> None:
    """Apply ``train.matmul_precision`` and ``train.deterministic``. Call before the first matmul on ``device``.

    On a CPU, neither has an effect: sums have a fixed order, and float32 matmuls have the full precision of float32.
    """
    if device.type != "cuda":
        return
    train = config.train
    torch.set_float32_matmul_precision(train.matmul_precision)
    if train.dtype == "float32":
        exact = train.matmul_precision == "highest"
        precision = "full float32" if exact else "TF32"
        hint = "; high is several times faster" if exact else ""
        logger.info("float32 matmuls in %s (train.matmul_precision=%s%s)", precision, train.matmul_precision, hint)
    if train.deterministic:
        # cuBLAS reads this when it creates its first handle; without it torch refuses matmuls.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward has no fixed order of summation
        # Autotuning chooses among kernels that sum in different orders.
        torch._inductor.config.deterministic = True  # type: ignore[attr-defined]
