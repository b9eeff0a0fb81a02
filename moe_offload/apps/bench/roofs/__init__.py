"""What no side can beat: the disk, the link to a device, the bound that follows from bytes and time."""
