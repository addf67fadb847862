"""Numbers that judge imaginations and policies."""
