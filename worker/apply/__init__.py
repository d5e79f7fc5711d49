"""What the processes of a worker's pool do: claim events from the stream, apply them, acknowledge them."""
