"""What the demo page lets in."""
