"""The classes that SAELens sees, and what is made of them: training, export, calibration."""
