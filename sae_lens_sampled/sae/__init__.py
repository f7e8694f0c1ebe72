"""The SAE classes that SAELens uses: training, warm start, export, calibration."""
