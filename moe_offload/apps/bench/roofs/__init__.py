"""Roofs: the bandwidth of the disk and of the link to a device, as measured, and the least time that it allows."""
