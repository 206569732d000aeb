"""What comes in: downloaded assets, models, calibration text and benchmark data."""
