"""What runs inside the sandbox. Its files import the standard library only: they are sent as text to `python -I -c`."""
