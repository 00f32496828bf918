"""Prints what ``MOE_FUSED_TEST_CPU_BF16`` must be for the processor to be taken for one of the other kind."""

from moe_fused.integrations.quantizer import bitsandbytes_cpu

if __name__ == "__main__":
    bitsandbytes_cpu.register()  # so that the import says nothing
    print("off" if bitsandbytes_cpu.repacks_on_this_cpu() else "on")
