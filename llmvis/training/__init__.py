"""Plain-torch training of each stage: what a step is, the loop around it, its state on disk. Knows no Ray."""
