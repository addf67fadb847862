"""What all tests share: hypothesis without deadlines, which a busy machine misses, and the same examples each run."""

from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("steady")
