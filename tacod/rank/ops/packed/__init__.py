"""Linear layers whose weights stay packed, by format."""
