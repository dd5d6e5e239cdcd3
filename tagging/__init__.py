"""A trained model at work: files and folders, streams, events, and what is written of them."""
