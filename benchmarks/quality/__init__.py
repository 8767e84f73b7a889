"""What low precision loses: ours and the peers on the same models, samples and test sets."""
