"""Where a step runs: execution providers, their options, and the placement of nodes."""
