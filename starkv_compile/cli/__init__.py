"""The command `starkv`. Other packages add commands to it (entry points `starkv.commands`)."""
