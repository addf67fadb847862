"""The world to token ids and back."""
