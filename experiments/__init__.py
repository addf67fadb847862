"""One file per result: it runs, writes CSV or JSON, then draws."""

if __name__ == "experiments":
    raise ImportError("import emu_embodied.experiments: the folder is one package with emu_embodied")
