"""What is computed of activations and dictionaries after training."""
