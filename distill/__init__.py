"""What a student learns from: replayed augmentation, stored soft targets, objectives."""
