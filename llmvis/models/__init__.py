"""Models: plain torch, no Ray, no command line."""
