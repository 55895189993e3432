"""What SSO needs to see a network's outputs, and to compute them again under the same circumstances."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Circumstances:
    """Random number generators and autocast as they were; ``restored`` brings them back for a while.

    Attributes:
        device: where the network computes.
        cpu_rng: state of the CPU generator.
        device_rng: state of the device's generator, None for the CPU.
        autocast: whether autocast was on, and its dtype.
    """

    device: torch.device
    cpu_rng: Tensor
    device_rng: Tensor | None
    autocast: tuple[bool, torch.dtype]

    @classmethod
    def now(cls, device: torch.device) -> "Circumstances":
        """Those of this moment."""
        on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        return cls(device, torch.get_rng_state(), on_device, autocast)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within it they are as they were; after it as they had been before it."""
        devices = [] if self.device_rng is None else [self.device]
        kind = "cuda" if self.device_rng is None else self.device.type
        enabled, dtype = self.autocast
        uncached = torch.autocast(self.device.type, dtype, enabled, cache_enabled=False)  # casts of old weights
        with torch.random.fork_rng(devices, device_type=kind), uncached:
            torch.set_rng_state(self.cpu_rng)
            if self.device_rng is not None:
                torch.get_device_module(self.device).set_rng_state(self.device_rng, self.device)
            yield


@dataclass
class CapturedCall:
    """One call of the network.

    Attributes:
        args: positional inputs, detached.
        kwargs: keyword inputs, detached.
        circumstances: of the call.
        output: the targets, detached.
        slope: the loss's gradient with respect to them, summed over backward passes; None before the first.
    """

    args: Any
    kwargs: Any
    circumstances: Circumstances
    output: Tensor
    slope: Tensor | None = None


class OutputCapture:
    """Records the differentiable calls of a module and the gradients that reach their outputs.

    Copies and pickles with its module: the module's hooks are this object's methods. A module has one at a time, the
    last.

    Args:
        module: the network.
        target_fn: picks the targets from its output; None when the output is one tensor.
    """

    def __init__(self, module: nn.Module, target_fn: Callable[[Any], Tensor] | None = None) -> None:
        self.module = module
        self.target_fn = target_fn
        self.calls: list[CapturedCall] = []
        self.paused = False
        self._circumstances: Circumstances | None = None
        for hooks in (module._forward_pre_hooks, module._forward_hooks):  # of an optimizer that this one replaces
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), OutputCapture)]:
                del hooks[key]
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": [], "_circumstances": None}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within it nothing is recorded."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def pop_calls(self) -> list[CapturedCall]:
        """The calls whose gradient arrived; forget all."""
        calls, self.calls = self.calls, []
        return [call for call in calls if call.slope is not None]

    def replay(self, calls: list[CapturedCall]) -> list[Tensor]:
        """The outputs of the same calls with the present parameters."""
        reshard(self.module)
        outputs = []
        for call in calls:
            with call.circumstances.restored():
                outputs.append(self.targets_of(self.module(*call.args, **call.kwargs)))
        return outputs

    def targets_of(self, output: Any) -> Tensor:
        """The targets in a module's output.

        Raises:
            TypeError: there is not exactly one tensor.
        """
        targets = output if self.target_fn is None else self.target_fn(output)
        if not isinstance(targets, Tensor):
            raise TypeError(
                f"SSO captures modules whose output is one tensor; {type(self.module).__name__} gave a "
                f"{type(targets).__name__}: pass target_fn, for example target_fn=lambda output: output.logits"
            )
        return targets

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.paused and torch.is_grad_enabled():
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            self._circumstances = Circumstances.now(device)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.paused or not torch.is_grad_enabled() or self._circumstances is None:
            return
        targets = self.targets_of(output)
        if not targets.requires_grad:
            return
        call = CapturedCall(_detached(args), _detached(kwargs), self._circumstances, targets.detach())
        self._circumstances = None
        self.calls.append(call)

        def arrived(grad: Tensor) -> None:
            call.slope = grad if call.slope is None else call.slope + grad

        targets.register_hook(arrived)


def reshard(module: nn.Module | None) -> None:
    """Drop what FSDP2 has gathered of the parameters, which is outdated once they have moved."""
    for part in [] if module is None else module.modules():
        if hasattr(part, "reshard"):
            part.reshard()  # type: ignore[operator]


@contextmanager
def unchanged_buffers(module: nn.Module | None) -> Iterator[None]:
    """Within it the module's buffers may change, such as running statistics; after it they have not."""
    buffers = [] if module is None else list(module.buffers())
    kept = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)


def _detached(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.detach()
    if isinstance(inputs, dict):
        return {key: _detached(value) for key, value in inputs.items()}
    if type(inputs) in (list, tuple):
        return type(inputs)(_detached(value) for value in inputs)
    return inputs
