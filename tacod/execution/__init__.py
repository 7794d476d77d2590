"""What runs and what is held: jobs, models and stored tensors."""
