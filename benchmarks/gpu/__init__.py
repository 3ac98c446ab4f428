"""What a GPU suite measures first wherever a GPU is at hand; see README.md beside this."""
