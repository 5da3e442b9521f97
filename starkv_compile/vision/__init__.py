"""What each token of a prompt is: text, or a place on a frame."""
