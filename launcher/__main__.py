"""``python -m launcher``: the command line as a module, for launchers that start Python modules."""

from launcher.cli import main

main()
