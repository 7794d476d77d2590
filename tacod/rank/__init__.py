"""What runs on a device: one process a rank, all doing the same in the same order."""
