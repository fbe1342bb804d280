"""Fresh random inputs, from the seed that the run prints."""

from __future__ import annotations

import dataclasses
import zlib

import torch

from benchmarks.gpu_proof.settings import Settings
from engine.device import Device, detect_device


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """Where inputs are made, and of which sizes."""

    device: Device
    generator: torch.Generator
    is_toy: bool

    @classmethod
    def of(cls, settings: Settings, name: str = "") -> Inputs:
        """The inputs of the check `name`, which are the same whatever was checked before it."""
        device = detect_device(0, settings.device)
        seed = (settings.seed << 32) + zlib.crc32(name.encode())
        return cls(device, torch.Generator(device.torch_device).manual_seed(seed), settings.is_toy)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> torch.Tensor:
        """Normally distributed numbers; never zeros, which hide what is not written and run faster."""
        numbers = torch.randn(shape, device=self.generator.device, generator=self.generator)
        return numbers.mul_(spread).to(dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """Integers [*shape] int64 from 0 to `high`, exclusive."""
        return torch.randint(high, shape, device=self.generator.device, generator=self.generator)
