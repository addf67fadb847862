"""Solvers over action sequences, objectives over imaginations, and the two dynamics they are evaluated with."""

if __name__ == "planners":
    raise ImportError("import emu_embodied.planners: the folder is one package with emu_embodied")
