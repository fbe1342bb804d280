"""The card, and the two ceilings that everything else is held against: copying memory and multiplying matrices."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess

import torch

from benchmarks.gpu_proof.clock import call_seconds
from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.settings import Settings
from engine.device import Device, detect_device

COPY_BYTES, TOY_COPY_BYTES = 4 << 30, 1 << 20
MATRIX_SIZE, TOY_MATRIX_SIZE = 8192, 64
CACHE_BYTES = 64 << 20
"""What the second-level cache is taken for where torch does not tell."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ceilings:
    """The rates that were measured on this card."""

    copy_gbps: float
    """GB/s, bytes read and bytes written together."""
    matrix_tflops: float
    """TFLOP/s of a large product in bfloat16."""
    cache_bytes: int
    """The second-level cache."""

    def floor_s(self, num_bytes: float, flops: float = 0.0) -> float:
        """Seconds that moving the bytes or doing the arithmetic takes at least."""
        return max(num_bytes / self.copy_gbps / 1e9, flops / self.matrix_tflops / 1e12)


def run(settings: Settings, report: Report) -> None:
    torch.manual_seed(settings.seed)
    device = detect_device(0, settings.device)
    (name, capability), driver = _describe(device), _driver(settings)
    report.fact(card=name, capability=capability, driver=driver)
    ceilings = measure_ceilings(device, is_toy=settings.is_toy)
    report.fact(ceilings=dataclasses.asdict(ceilings))
    report.row(
        "The card",
        card=name,
        capability=".".join(map(str, capability)),
        driver=driver,
        **{"copy GB/s": ceilings.copy_gbps, "bf16 TFLOP/s": ceilings.matrix_tflops},
    )
    report.check("the ceilings could be measured", [] if ceilings.copy_gbps > 0 else ["a copy took no time"])


def read_ceilings(settings: Settings, device: Device) -> Ceilings:
    """The ceilings that the part `card` has found in this run, or, if it did not run, new ones."""
    path = settings.part_file("card")
    facts = json.loads(path.read_text())["facts"] if path.exists() else {}
    return Ceilings(**facts["ceilings"]) if "ceilings" in facts else measure_ceilings(device, is_toy=settings.is_toy)


def measure_ceilings(device: Device, *, is_toy: bool) -> Ceilings:
    """Measure them on random numbers: both run faster on zeros."""
    num_bytes, size = (TOY_COPY_BYTES, TOY_MATRIX_SIZE) if is_toy else (COPY_BYTES, MATRIX_SIZE)
    copy_s = _copy_seconds(device, num_bytes)
    left, right = (torch.randn(size, size, device=device.torch_device).to(torch.bfloat16) for _ in range(2))
    product_s = call_seconds(device, [lambda: left @ right])
    cache_bytes = CACHE_BYTES
    if device.torch_device.type != "cpu":
        cache_bytes = torch.cuda.get_device_properties(device.torch_device).L2_cache_size or CACHE_BYTES
    return Ceilings(2 * num_bytes / copy_s / 1e9, 2 * size**3 / product_s / 1e12, cache_bytes)


def _copy_seconds(device: Device, num_bytes: int) -> float:
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device).random_()
    target = torch.empty_like(source)
    return call_seconds(device, [lambda: target.copy_(source)])


def _describe(device: Device) -> tuple[str, tuple[int, int]]:
    """The name and the compute capability."""
    if device.torch_device.type == "cpu":
        return f"interpreter on {platform.machine()}", (0, 0)
    return torch.cuda.get_device_name(device.torch_device), torch.cuda.get_device_capability(device.torch_device)


def _driver(settings: Settings) -> str:
    if settings.is_interpreted:
        return "none"
    command = "nvidia-smi --query-gpu=driver_version --format=csv,noheader".split()
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
