"""How tokens come out: one by one, or a whole state in parallel."""
