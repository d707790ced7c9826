"""Torch's operations refuse memory, as a full GPU would, at places that a test chooses."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

REFUSAL = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Refusing(TorchDispatchMode):
    """Inside the `with`, torch's operations that take memory fail for which `is_refused(number)` is true; they are numbered from
    0. Those of a failed attempt count too."""

    def __init__(self, is_refused=lambda number: False):
        super().__init__()
        self.is_refused, self.num_calls = is_refused, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(value.alias_info is None for value in function._schema.returns):
            self.num_calls += 1
            if self.is_refused(self.num_calls - 1):
                raise torch.OutOfMemoryError(REFUSAL + ". GPU 0 has a total capacity of 79 GiB\nmore")
        return function(*args, **(kwargs or {}))


class RefusingCalls:
    """Calls of these functions, given as (class, name), fail for which `is_refused(number)` is true: even ones before they do
    anything, odd ones when all is done. They are numbered from 0."""

    def __init__(self, monkeypatch, places, is_refused=lambda number: False):
        self.is_refused, self.num_calls, self.refused = is_refused, 0, []
        for owner, name in places:
            monkeypatch.setattr(owner, name, self._wrapped(owner.__dict__[name], name))

    def _wrapped(self, function, name):
        def call(*arguments, **settings):
            number, self.num_calls = self.num_calls, self.num_calls + 1
            is_refused = self.is_refused(number)
            if is_refused and number % 2:
                function(*arguments, **settings)
            if is_refused:
                self.refused.append(name)
                raise torch.OutOfMemoryError(REFUSAL)
            return function(*arguments, **settings)

        return call
