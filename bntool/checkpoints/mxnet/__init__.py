"""Files of arrays that MXNet writes."""
