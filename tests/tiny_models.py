"""The fixtures' tiny checkpoints, loaded and compared."""

from pathlib import Path

import torch
from paths import FIXTURES
from safetensors.torch import load_file

from models.formats.hugging_face import load_model
from models.gpt_oss import GptOss

BF16, MXFP4, LORA = FIXTURES / "tiny_bf16", FIXTURES / "tiny_mxfp4", FIXTURES / "tiny_bf16_lora"


def load(folder: Path | str, *, experts: str = "auto", dtype: torch.dtype = torch.float32, device: str = "cpu") -> GptOss:
    return load_model(folder, device=device, dtype=dtype, experts=experts)


def golden(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "golden.safetensors")


def logits_of(model: GptOss, ids: torch.Tensor) -> torch.Tensor:
    """[B, L, V] of sequences ids [B, L]."""
    bounds = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
    with torch.no_grad():
        return model.logits(ids.flatten().to(model.device), bounds).view(*ids.shape, -1)


def fill_trainable(model: GptOss, *, ends_in: str = "", seed: int = 0) -> None:
    """Adds noise to what trains, or to what of it has such a name, so that a fresh adapter changes the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.trainable_parameters().items():
        if name.endswith(ends_in):
            parameter.data.add_(model.own(name, torch.randn(model.whole_shape(name), generator=generator) * 0.05))
