"""The parts a Transformer is made of."""
