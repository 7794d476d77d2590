"""Programs that ``tacoctl`` starts."""
