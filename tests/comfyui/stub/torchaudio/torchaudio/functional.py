"""Nothing that tests run needs what torchaudio has here."""
