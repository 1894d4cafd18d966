"""`python -m tpctl`."""

from tpctl.app import main

main()
