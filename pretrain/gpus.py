"""What is known of GPUs, from NVIDIA's data sheets. `biogpt plan` and the MFU of a run read it."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """A kind of GPU."""

    device_name: str
    """A part of the name that torch gives it."""
    memory: float
    """Bytes, as the data sheet counts them: a GB is 10^9 bytes. torch reports a few percent more or less."""
    peak_flops: float
    """Floating point operations a second in bf16, dense, summed in fp32."""


GPUS = {
    "a100-40gb": Gpu("A100-SXM4-40GB", 40e9, 312e12),
    "a100": Gpu("A100", 80e9, 312e12),
    "h100": Gpu("H100", 80e9, 989e12),
    "h200": Gpu("H200", 141e9, 989e12),
    "l40s": Gpu("L40S", 48e9, 362e12),
    "rtx4090": Gpu("RTX 4090", 24e9, 165e12),
}
"""By the name that `biogpt plan --gpu` takes. A name of torch's belongs to the first entry that it contains."""
