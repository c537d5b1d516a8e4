"""What can be done with recipes? Commands over several of them, or beside them."""
