"""What the commands share: flags, checks that need no torch, and how a command ends. Imports no command."""
