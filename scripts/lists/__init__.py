"""Making lists of sounds: the options of the command, and what it prints."""
