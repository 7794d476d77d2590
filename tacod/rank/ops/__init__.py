"""Operations on one device, with kernels beside plain PyTorch."""
