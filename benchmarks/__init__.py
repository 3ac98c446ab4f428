"""What the package costs, against its peers and its past: scripts, and the suite for a GPU in `gpu`."""
