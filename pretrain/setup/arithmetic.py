"""How a GPU is to calculate: the precision of float32 products, and whether every sum has one order."""

import logging
import os

import torch

from pretrain.config.schema import Config

logger = logging.getLogger(__name__)


def set_arithmetic(config: Config, device: torch.device) -> None:
    """Set what ``train.matmul_precision`` and ``train.deterministic`` ask for, before the first product on ``device``.

    On a CPU neither changes anything: its sums have one order, and its float32 products are float32.
    """
    if device.type != "cuda":
        return
    train = config.train
    torch.set_float32_matmul_precision(train.matmul_precision)
    if train.dtype == "float32":
        exact = train.matmul_precision == "highest"
        logger.info(
            "float32 products are %s (train.matmul_precision=%s%s)",
            *("exact" if exact else "TF32", train.matmul_precision, "; high is several times faster" if exact else ""),
        )
    if train.deterministic:
        # cuBLAS reads it when it makes its first handle; torch refuses the products otherwise.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward sums in any order
        # Tuning by time chooses among kernels that sum in different orders.
        torch._inductor.config.deterministic = True  # type: ignore[attr-defined]
