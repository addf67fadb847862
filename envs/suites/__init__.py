"""Benchmarks that people know, behind the seam of our own worlds: ``emu_embodied.envs.make("MetaWorld/reach-v3")``.

``catalog`` says which there are and what each needs; a world's simulator is imported when an environment is made.
"""
