"""Adapters in the model's dtype, copied once for a rollout: decode steps read half the bytes of the fp32 masters, which kernels
round to that dtype at every use. So no bit depends on it. And counters with which a product's launch computes its LoRA's low-rank
rows too (kernels/experts/few_rows.py).
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models.experts import RoutedExperts
from models.gpt_oss import GptOss
from models.projections import Linear


class AdapterCopies:
    """`model`'s adapters as they were at the last refresh(), at fixed addresses. There are none unless it is bfloat16, and none
    where decode steps launch one by one, which would take the host longer. The router's stays as it is: its product is fp32."""

    def __init__(self, model: GptOss) -> None:
        self._model, self._copies = model, dict[str, torch.Tensor]()
        is_used = model.dtype == torch.bfloat16 and model.serves_few_rows
        flat: dict[tuple[int, int], torch.Tensor] = {}  # by storage: tensors that lie side by side stay so
        for name, parameter in model.named_parameters():
            if is_used and name.endswith(("lora_A", "lora_B")) and ".router." not in name:
                storage = parameter.untyped_storage()
                key = storage.data_ptr(), storage.nbytes()
                if key not in flat:
                    flat[key] = torch.empty(key[1] // parameter.itemsize, dtype=model.dtype, device=parameter.device)
                self._copies[name] = flat[key].as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
        modules = [module for module in model.modules() if isinstance(module, RoutedExperts) or type(module) is Linear]
        # a row for each: a dense product counts in the first, the two of the experts in one each
        self._counters = torch.zeros(len(modules), 2, dtype=torch.int32, device=model.device)
        self._counted = list(zip(modules, self._counters))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the adapters as they are now."""
        if self._copies:
            parameters = dict(self._model.named_parameters())
            for name, copy in self._copies.items():
                copy.copy_(parameters[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the `with`, the model computes with the copies. For one pass without gradient, or the capture of one."""
        if not self._copies:
            yield
            return
        self._counters.zero_()  # in a capture, at the start of every step
        try:
            for module, counters in self._counted:
                module.low_rank_ready = counters
            with self._model.exchanged(self._copies):
                yield
        finally:
            for module, _ in self._counted:
                module.low_rank_ready = None
