"""A model made ready to run: a plan of what runs each part, prepared weights, CUDA graphs and streams around them."""
