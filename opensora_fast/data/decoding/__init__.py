"""From a file to the frames that are asked of it: decoders behind one interface."""
