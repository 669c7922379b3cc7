"""Networks and data to begin with: recipes, their graphs, the download of their data, training from scratch."""
