"""What a trained model is worth: perplexity, bits per byte and sparsity."""
