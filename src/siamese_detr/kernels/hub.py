"""Compiled kernels in the place of a model's layers, for those who ask for them.

The Hugging Face hub has kernels for some layers, deformable attention among them, built for each PyTorch and each
accelerator. Transformers knows which, the package ``kernels`` downloads them; both check what they load.
"""

from __future__ import annotations

import transformers
from torch import nn
from transformers.utils import import_utils

from siamese_detr.errors import UserError


def use_kernels(model: nn.Module) -> list[str]:
    """Let every layer of the detector in ``model`` for which there is a kernel compute by it.

    Args:
        model: a detector, or what holds one; already on the device it computes on.

    Returns:
        names of the layers replaced; none where there is no kernel for the device.

    Raises:
        UserError: the package is missing or not the one Transformers works with; a kernel cannot be loaded.
    """
    if not import_utils.is_kernels_available():
        oldest, later = import_utils.KERNELS_MIN_VERSION, import_utils.KERNELS_MAX_VERSION
        raise UserError(
            f"kernels hub: Transformers {transformers.__version__} needs the package kernels for this: "
            f"pip install 'kernels>={oldest},<{later}', or use --kernels auto"
        )
    detector = next(part for part in model.modules() if isinstance(part, transformers.PreTrainedModel))
    try:
        detector.set_use_kernels(True)
    except Exception as error:  # whatever downloading, checking and loading a library can end with
        raise UserError(f"kernels hub: no kernel could be loaded ({error}); use --kernels auto") from error
    return sorted({type(part).__name__ for part in detector.modules() if has_kernel(part)})


def has_kernel(layer: nn.Module) -> bool:
    """Whether a kernel has taken the place of a layer's own function."""
    forward = vars(layer).get("forward")  # where there was no kernel for the device, its own one
    return forward is not None and getattr(forward, "__func__", None) is not type(layer).forward
