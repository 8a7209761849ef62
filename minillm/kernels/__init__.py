"""Paged attention, the small operations of a step and sampling, once for each kind of device, behind one interface.

May import `model`, `sampling` and `attention`. Nothing here waits for the device.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "building": "compiler",
        "cpu.counting": "counting",
        "cuda.compiled": "compile_for_gpu",
        "cuda.emulator": "emulator",
        "dispatch": "ATTENTION_BACKENDS AttentionInputs Backend PagedAttention choose fused",
        "triton_kernels": "DECODE_LAUNCH",
    },
)
