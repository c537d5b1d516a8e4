"""Where do images come from? Data sets, folders, logs, and the streams made of them."""
