"""What several test modules need: real servers, and stand-ins for the other side of a boundary."""
