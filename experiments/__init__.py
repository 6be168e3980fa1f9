"""Claims about optimisers, each measured by one command: ``python -m experiments run FIGURE``."""
