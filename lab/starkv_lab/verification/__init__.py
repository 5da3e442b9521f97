"""`starkv verify`: checks a compressed cache on the user's own model, machine and screenshots."""
