"""Several methods trained and tested alike: the runs, the table, the plot."""
