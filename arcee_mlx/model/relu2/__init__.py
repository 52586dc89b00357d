"""What only a decoder with squared ReLU can do: its down projection by neuron, and its exact symmetries."""
