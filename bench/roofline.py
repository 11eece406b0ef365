"""What an NVIDIA GPU could do at best, from its attributes: the measure of every time on it."""

from dataclasses import dataclass

from kernels.device import Device

# Multiplications and additions of one SM in a cycle: of its CUDA cores in fp32, and of its tensor cores in fp16, dense,
# at the best rate that any card of that compute capability has.
_FP32 = {"7.5": 128, "8.0": 128, "8.6": 256, "8.9": 256, "9.0": 256, "10.0": 256, "12.0": 256}
_FP16 = {"7.5": 1024, "8.0": 2048, "8.6": 1024, "8.9": 1024, "9.0": 4096, "10.0": 8192, "12.0": 1024}


@dataclass(frozen=True)
class Card:
    name: str
    compute_capability: str
    multiprocessors: int
    gigabytes_s: float  # of its memory
    fp32_gflop_s: float | None  # None: not known of this compute capability
    fp16_gflop_s: float | None

    def least_ms(self, megabytes: float, gflop: float | None, *, half: bool) -> float:
        """No less can it take to move and to compute this. What is not known is left out.

        half: fp16 on tensor cores, not fp32.
        """
        rate = self.fp16_gflop_s if half else self.fp32_gflop_s
        return max(megabytes / self.gigabytes_s, 1e3 * gflop / rate if gflop and rate else 0.0)


def card_of(device: Device) -> Card:
    return make_card(
        device.name,
        device.compute_capability,
        device.attribute("MULTIPROCESSOR_COUNT"),
        device.attribute("CLOCK_RATE"),
        device.attribute("MEMORY_CLOCK_RATE"),
        device.attribute("GLOBAL_MEMORY_BUS_WIDTH"),
    )


def make_card(name: str, capability: str, multiprocessors: int, clock_khz: int, memory_khz: int, bus_bits: int) -> Card:
    per_cycle = multiprocessors * clock_khz * 1e3 / 1e9
    fp32, fp16 = (table[capability] * per_cycle if capability in table else None for table in (_FP32, _FP16))
    return Card(
        name, capability, multiprocessors, 2 * memory_khz * 1e3 * bus_bits / 8e9, fp32, fp16
    )  # double data rate
