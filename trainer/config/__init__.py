"""The configuration of a run and of `LocalSGD`, and the recipes it is read from. Imports no torch."""
