"""The best layouts of a model on a cluster: what is legal, what it costs, and which is best."""
