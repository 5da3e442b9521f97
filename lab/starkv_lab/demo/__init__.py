"""One GUI session with a full cache and with compressed ones: `starkv demo`."""
