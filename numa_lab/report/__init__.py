"""What is told of a run: figures, sentences, and the page that holds them."""
