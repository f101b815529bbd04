"""What editors know of the model and of text before they edit: covariances."""
