"""What lies on disk, and which bytes of it make one expert's row.

Reads headers, never weights (but for the dense ones, which transformers loads); writes whole folders or none. May
import files, config and experts; knows neither slots nor a running model.
"""
