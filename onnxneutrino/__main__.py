"""`python -m onnxneutrino`."""

from onnxneutrino.cli import main

main()
