"""`starkv demo` runs one GUI session with a full cache and with compressed caches."""
