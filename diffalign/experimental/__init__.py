"""What never ran on the hardware it is for: Triton kernels for normalisation and GEGLU."""
