"""What the inserting passes share: the draft of the step, and the nodes of one table."""
