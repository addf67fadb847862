"""What acts: random, scripted, planning and token policies behind one protocol (``act(observation) -> actions_KA``)."""

if __name__ == "policies":
    raise ImportError("import emu_embodied.policies: the folder is one package with emu_embodied")
