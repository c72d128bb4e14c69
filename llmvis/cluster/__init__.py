"""The only sub-package that imports Ray."""
