"""How a UNet computes: attention kernels, compilation, checkpointing."""
